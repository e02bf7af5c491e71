"""How much memory a whole merge takes whose models are larger than that: 3 experts of a locally made Llama.

Calibration rows, no validation and no test rows: Gram matrices (or a walk), anchor, regression, and the written model.
The merge runs through the command in a process of its own; what each of its processes, workers included, had in memory
at most is the kernel's own count (`VmHWM`), files that are mapped into memory included, stage by stage.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml
from benchmarks.llama import Shape, make, texts

EXPERTS = 3
MEMORY = "4GiB"
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Streamed:
    """What one merge took.

    Attributes:
        seconds: from start to end.
        peaks: bytes that each process had in memory at most: the merge's own, and each worker's.
        stages: seconds by stage.
        planned: what `bmm plan` said of each stage before.
        stage_peaks: by stage, bytes that the process which had most had in memory at most while it ran.
    """

    seconds: float
    peaks: Mapping[str, int]
    stages: Mapping[str, float]
    planned: Mapping[str, Mapping[str, Any]]
    stage_peaks: Mapping[str, int]

    @property
    def peak(self) -> int:
        """Bytes of the process that had most."""
        return max(self.peaks.values())


def measure(folder: Path, *, quick: bool = False) -> dict[str, Any]:
    """Merge by both modes where quick, else by the walk alone: Gram matrices of 22 layers take 50 GB of disk."""
    shape, rows, tokens = (Shape(num_hidden_layers=2), 4, 32) if quick else (Shape(), 8, 128)
    prepare(folder, shape, rows, tokens)
    found = {
        mode: run(folder, mode, rows, tokens, MEMORY) for mode in (("module-wise",) if quick else ()) + ("propagated",)
    }
    return {
        "streamed_peak_rss_bytes": max(streamed.peak for streamed in found.values()),
        "shape": vars(shape),
        "rows": rows,
        "tokens": tokens,
        "modes": {mode: vars(streamed) for mode, streamed in found.items()},
    }


def prepare(folder: Path, shape: Shape, rows: int, tokens: int) -> None:
    """Make base, experts and rows."""
    base = make(folder / "base", shape, 0)
    for number in range(EXPERTS):
        make(folder / f"expert-{number}", shape, number + 1, base)
        lines = [json.dumps({"text": text}) for text in texts(rows, tokens, number)]
        (folder / f"rows{number}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def recipe(folder: Path, mode: str, rows: int, tokens: int, memory: str, workers: int = 1) -> Path:
    """Write the recipe of a merge without a search, and return its path."""
    calibration = {"path": "json", "split": "train"}
    experts = [
        {
            "name": f"expert{number}",
            "model": f"./expert-{number}",
            "task": {
                "kind": "causal-lm",
                "text": "text",
                "max_length": tokens,
                "calibration": {**calibration, "data_files": f"rows{number}.jsonl", "rows": rows},
            },
        }
        for number in range(EXPERTS)
    ]
    value = {
        "base_model": "./base",
        "experts": experts,
        "anchor": {"method": "ta"},
        "grams": {"source": "activations", "batch_size": 8},
        "regression": {"mode": mode, "lambda": 0.1},
        "evaluation": {"batch_size": 8},
        "cluster": {"workers": workers, "memory_limit": memory},
        "max_shard_size": "512MiB",
        "tracking": {"enabled": False},
        "output": f"./merged-{mode}",
    }
    path = folder / f"{mode}.yaml"
    path.write_text(yaml.safe_dump(value, sort_keys=False), encoding="utf-8")
    return path


def run(folder: Path, mode: str, rows: int, tokens: int, memory: str) -> Streamed:
    """Merge once from an empty store, and return what it took; the store and the output are removed afterwards."""
    store = folder / f"store-{mode}"
    shutil.rmtree(store, ignore_errors=True)
    path = recipe(folder, mode, rows, tokens, memory)
    bmm = [sys.executable, "-c", "from flows.cli import main; main()"]
    said = subprocess.run([*bmm, "plan", str(path), "--store", str(store), "--json"], capture_output=True, check=True)
    planned = {stage["stage"]: stage for stage in json.loads(said.stdout)["stages"]}
    started = time.perf_counter()
    command = [*bmm, "merge", str(path), "--store", str(store), "--no-server", "--json"]
    with (folder / f"{mode}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
        peaks: dict[str, int] = {}
        stage_peaks: dict[str, int] = {}
        while process.poll() is None:
            stage = next((name for name in planned if not _is_done(store, name)), None)
            now = _look(process.pid)
            for name, most in now.items():
                peaks[name] = max(peaks.get(name, 0), most)
            if stage is not None:
                stage_peaks[stage] = max(stage_peaks.get(stage, 0), *now.values(), 0)
            time.sleep(_POLL_SECONDS)
        output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the merge failed: {(folder / f'{mode}.log').read_text(encoding='utf-8')[-2000:]}")
    seconds = time.perf_counter() - started
    merged = Path(json.loads(output)["output"])
    document = json.loads((merged / "merge.json").read_text(encoding="utf-8"))
    stages = {name: stage["seconds"] for name, stage in document["stages"].items()}
    for place in (store, merged):
        shutil.rmtree(place)
    return Streamed(seconds, peaks, stages, planned, stage_peaks)


def _is_done(store: Path, stage: str) -> bool:
    return any((store / "artefacts" / f"stage-{stage}").glob("*"))


def _look(pid: int) -> dict[str, int]:
    """Return the most bytes that each process of a merge has had in memory since the last look."""
    found = {}
    with suppress(psutil.NoSuchProcess):
        for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            with suppress(OSError, psutil.NoSuchProcess):
                found["merge" if process.pid == pid else f"worker {process.pid}"] = _most(process.pid)
    return found


def _most(pid: int) -> int:
    """Return the most bytes that a process has had in memory since the last time, by the kernel's count."""
    place = Path(f"/proc/{pid}")
    lines = (place / "status").read_text(encoding="ascii").splitlines()
    # The kernel counts from what is there now on.
    (place / "clear_refs").write_text("5", encoding="ascii")
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
