"""Merging checkpoints of 1.1 billion parameters in bfloat16: `bmm merge` against mergekit's command.

Both are commands in processes of their own, on warm files, and write sharded bfloat16. Ours also takes the digests of
everything that it reads and writes, and makes each file durable. mergekit 0.1.5 has no TSV-M: of that one only our own
seconds and memory are told.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.measuring import Run, by_turns, ratio, run

EXPERTS = 3
_PREPARE = """
import sys
from pathlib import Path
from benchmarks.llama import Shape, make

place, experts, layers = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
base = make(place / "base", Shape(num_hidden_layers=layers), 0)
for number in range(experts):
    make(place / f"expert-{number}", Shape(num_hidden_layers=layers), number + 1, base)
"""
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "ta": ({"method": "ta", "scale": 0.3}, {"merge_method": "task_arithmetic", "each": {"weight": 0.3}}),
    "ties": (
        {"method": "ties", "scope": "tensor", "density": 0.2},
        {"merge_method": "ties", "each": {"density": 0.2, "weight": 1.0}, "parameters": {"normalize": True}},
    ),
    "tsv": ({"method": "tsv"}, None),
}
"""Our word for a method -> our settings, and mergekit's."""


def measure(folder: Path, *, quick: bool, layers: int | None = None) -> dict[str, Any]:
    """Return what each method takes, ours over mergekit's."""
    layers = layers or (2 if quick else 22)
    found: dict[str, Any] = {"layers": layers, "methods": {}}
    with TemporaryDirectory(dir=folder) as place:
        run(["-c", _PREPARE, place, str(EXPERTS), str(layers)])
        # TSV-M takes more than a minute a layer.
        for method in ("ta", "ties") if quick else METHODS:
            found["methods"][method] = _method(Path(place), method, 1 if quick else 3)
    compared = {method: one for method, one in found["methods"].items() if one["mergekit"]}
    found["merge_seconds_vs_mergekit"] = {method: one["seconds"]["median"] for method, one in compared.items()}
    found["merge_rss_vs_mergekit"] = {method: one["memory"]["median"] for method, one in compared.items()}
    return found


def _method(place: Path, method: str, repetitions: int) -> dict[str, Any]:
    ours, theirs = METHODS[method]
    runs: dict[str, list[Run]] = {"ours": []} | ({"mergekit": []} if theirs else {})

    def one(whose: str) -> float:
        shutil.rmtree(place / "out", ignore_errors=True)
        shutil.rmtree(place / "store", ignore_errors=True)
        command = _ours(place, ours) if whose == "ours" else _mergekit(place, theirs or {})
        runs[whose].append(run(command, environment={"HF_HUB_OFFLINE": "1", "BMM_STORE": str(place / "store")}))
        return runs[whose][-1].seconds

    # TSV-M is a matter of many minutes: once is enough for a number beside which nothing stands.
    taken = by_turns({whose: lambda whose=whose: one(whose) for whose in runs}, repetitions if theirs else 1)
    memory = {whose: [float(found.peak_rss_bytes) for found in own] for whose, own in runs.items()}
    result: dict[str, Any] = {"taken": taken, "peak_rss_bytes": memory, "mergekit": theirs is not None}
    if theirs:
        result |= {"seconds": ratio(taken["ours"], taken["mergekit"])}
        result |= {"memory": ratio(memory["ours"], memory["mergekit"])}
    shutil.rmtree(place / "out", ignore_errors=True)
    shutil.rmtree(place / "store", ignore_errors=True)
    return result


def _ours(place: Path, anchor: dict[str, Any]) -> list[str]:
    recipe = {
        "base_model": str(place / "base"),
        "experts": [{"name": f"e{index}", "model": str(place / f"expert-{index}")} for index in range(EXPERTS)],
        "output": str(place / "out"),
        "anchor": anchor,
        "regression": {"mode": "none"},
        "max_shard_size": "1GB",
        "tracking": {"enabled": False},
    }
    file = place / "recipe.yaml"
    # YAML takes JSON.
    file.write_text(json.dumps(recipe), encoding="utf-8")
    return ["-c", "from flows.cli import main; main()", "merge", str(file), "--no-server", "--json"]


def _mergekit(place: Path, said: dict[str, Any]) -> list[str]:
    config = {
        "merge_method": said["merge_method"],
        "base_model": str(place / "base"),
        "models": [{"model": str(place / f"expert-{index}"), "parameters": said["each"]} for index in range(EXPERTS)],
        "parameters": said.get("parameters", {"normalize": False}),
        "dtype": "bfloat16",
    }
    file = place / "mergekit.yaml"
    file.write_text(json.dumps(config), encoding="utf-8")
    command = os.path.join(os.path.dirname(sys.executable), "mergekit-yaml")
    return [command, str(file), str(place / "out"), "--no-copy-tokenizer", "--out-shard-size", "1B", "--quiet"]
