"""Pico experts that lie in folders to be found, and nights over them, for tests."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from bmm.store import Store


def found_experts(pico: Path, **nightly: Any) -> Path:
    """Turn a pico folder's recipe into one that finds its experts; return the recipe's path."""
    path = pico / "recipe.yaml"
    said = yaml.safe_load(path.read_text(encoding="utf-8"))
    splits = {
        split: {"path": "json", "data_files": f"data/{{name}}/{split}.jsonl"}
        for split in ("calibration", "validation", "test")
    }
    said["experts"] = [{"find": "./experts/*", "task": {"kind": "text-classification", "max_length": 16, **splits}}]
    said |= {
        "search": {"trials": 3, "per": "model"},
        "cluster": {"workers": 1},
        "evaluation": {"bootstrap_samples": 200, "compare": []},
        "nightly": nightly,
    }
    path.write_text(yaml.safe_dump(said, sort_keys=False), encoding="utf-8")
    return path


def edit(path: Path, **changes: Any) -> None:
    """Set top-level keys of a recipe (None removes)."""
    said = {**yaml.safe_load(path.read_text(encoding="utf-8")), **changes}
    said = {key: value for key, value in said.items() if value is not None}
    path.write_text(yaml.safe_dump(said, sort_keys=False), encoding="utf-8")


def copy_expert(pico: Path, name: str, new: str) -> None:
    """Put a copy of an expert, rows and all, under another name."""
    shutil.copytree(pico / "experts" / name, pico / "experts" / new)
    shutil.copytree(pico / "data" / name, pico / "data" / new)


def nudge(expert: Path, scale: float = 1.001) -> None:
    """Change an expert's weights a little, without changing what it is worth."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(expert / "model.safetensors")
    name = next(name for name in sorted(tensors) if name.endswith("query.weight"))
    tensors[name] = tensors[name] * scale
    save_file(tensors, expert / "model.safetensors", metadata={"format": "pt"})


def spoil(expert: Path, value: float = float("nan")) -> None:
    """Put a number that is none into an expert's encoder."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(expert / "model.safetensors")
    name = next(name for name in sorted(tensors) if name.endswith("query.weight"))
    tensors[name][0, 0] = value
    save_file(tensors, expert / "model.safetensors", metadata={"format": "pt"})


def champion_of(recipe: Path) -> dict[str, Any]:
    """Return merge.json of the folder that holds the champion."""
    found: dict[str, Any] = json.loads((recipe.parent / "merged" / "merge.json").read_text(encoding="utf-8"))
    return found


def ask_here(
    _: Any, function: Callable[[dict[str, Any]], Any], requests: Any, *__: Any, landed: Any, **___: Any
) -> None:
    """Stand in for `run_all` of the Gram stage: compute in this process."""
    for place, one in enumerate(requests):
        landed(place, function(dict(one)))


def compute_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute Gram shards and walks in this process, without Dask."""
    from contextlib import nullcontext
    from types import SimpleNamespace

    monkeypatch.setattr("bmm.stages.grams.workers", lambda _: nullcontext())
    monkeypatch.setattr("bmm.stages.grams.run_all", ask_here)
    cluster = SimpleNamespace(count=lambda: 1, everywhere=lambda function, *arguments: function(*arguments))
    monkeypatch.setattr("bmm.stages.walker.workers", lambda _: nullcontext(cluster))
    monkeypatch.setattr(
        "bmm.stages.walker.run_all", lambda _, function, requests, **__: [function(one) for one in requests]
    )


def counted_night(recipe: str, store: str, told: str, last: int, later: float) -> None:
    """Carry out a night, and write down what came of it and how often it wrote; or be killed before.

    Args:
        recipe: the recipe.
        store: the store.
        told: the file for the outcome.
        last: die at the write of this number, from 1; at none for 0. Files opened to be written, renamed or removed,
            folders made and calls on the registry count as writes.
        later: so many seconds after that write.
    """
    from flows.night import Here, night

    count = 0
    others = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "sqlite3.connect"}

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in others or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            count += 1
            if count == last:
                if later:
                    threading.Timer(later, os.kill, (os.getpid(), signal.SIGKILL)).start()
                else:
                    os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    found = night(Path(recipe), Store.open(store), Here())
    Path(told).write_text(json.dumps({**found, "writes": count}), encoding="utf-8")
