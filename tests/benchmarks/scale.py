"""`make benchmark-scale`: memory and seconds of the Gram stage and of merges, against the floor and against the peers.

    python -m benchmarks.scale                        all parts that are not there yet
    python -m benchmarks.scale --part merges --again  one of them, measured again

Every ratio is of measurements by turns in one run, a median with its least and largest. A part's result is kept as soon
as it is there, so that a killed benchmark carries on where it stopped.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Part:
    """One part: the module that measures it, and the keys of its results with what they should be at most.

    `in_folder` says whether it wants a folder for its files. It is left out while what it `needs` is not there.
    """

    name: str
    module: str
    keys: dict[str, float | None]
    in_folder: bool = True
    needs: str = "benchmarks.measuring"


PARTS = (
    Part(
        "floor",
        "benchmarks.scaling.gram_floor",
        {"gram_seconds_vs_floor": 1.2, "gram_seconds_16_tokens_vs_all": None},
        in_folder=False,
    ),
    Part(
        "peer",
        "benchmarks.scaling.gram_peer",
        {"gram_seconds_vs_fusion_bench": 2 / 3, "gram_rss_vs_fusion_bench": 1.0},
    ),
    Part(
        "stage",
        "benchmarks.scaling.gram_stage",
        {"two_workers_speedup": -1.8, "two_bare_processes_speedup": None, "one_of_eight_changed": 1 / 8 + 0.05},
    ),
    Part(
        "merges",
        "benchmarks.scaling.merges",
        {"merge_seconds_vs_mergekit": 1.0, "merge_rss_vs_mergekit": 1.0},
    ),
    Part("trials", "benchmarks.scaling.trials", {"trial_vs_refactorise": 0.6}, in_folder=False),
    Part("streaming", "benchmarks.scaling.streaming", {"streamed_peak_rss_bytes": 6 * 2**30}),
    Part("plan", "benchmarks.scaling.plan", {"planned_peak_vs_measured": None}),
    Part(
        "overhead",
        "benchmarks.scaling.overhead",
        {"store_overhead_10k_shards": 0.05},
        in_folder=False,
        needs="benchmarks.overhead",
    ),
)
"""A negative target is a least."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    said = _parser().parse_args(arguments)
    console = Console()
    file = said.output / ("scale-quick.json" if said.quick else "scale.json")
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    failed = False
    for part in PARTS:
        asked = not said.part or part.name in said.part
        known = all(key in results for key in part.keys)
        if not asked or (known and not said.again) or importlib.util.find_spec(part.needs) is None:
            continue
        started = perf_counter()
        console.print(f"{part.name}: measuring", markup=False)
        try:
            found = _measured(part, said)
        except Exception as error:
            failed = True
            console.print(f"{part.name} FAILED: {type(error).__name__}: {error}", markup=False, style="red")
            continue
        results |= {key: found.pop(key) for key in part.keys}
        results.setdefault("details", {})[part.name] = {**found, "seconds_taken": perf_counter() - started, **_where()}
        said.output.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    console.print(_table(results))
    console.print(f"written to {file}", markup=False, soft_wrap=True)
    return 1 if failed else 0


def _measured(part: Part, said: argparse.Namespace) -> dict[str, Any]:
    measure: Callable[..., dict[str, Any]] = importlib.import_module(part.module).measure
    if not part.in_folder:
        return measure(quick=said.quick)
    with TemporaryDirectory(dir=said.scratch) as folder:
        return measure(Path(folder), quick=said.quick)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.scale", description="Seconds and memory, ours over theirs.")
    parser.add_argument("--part", action="append", choices=[part.name for part in PARTS], help="only this; repeatable")
    parser.add_argument("--again", action="store_true", help="measure what is there already")
    parser.add_argument("--quick", action="store_true", help="small models, to see that everything runs")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of scale.json")
    parser.add_argument("--scratch", type=Path, help="folder for checkpoints of up to 20 GB; else the system's own")
    return parser


def _table(results: dict[str, Any]) -> Table:
    table = Table(title="scale, ours over theirs", show_edge=False, header_style="bold")
    for column in ("measure", "median", "low", "high", "target"):
        table.add_column(column, justify="left" if column == "measure" else "right")
    for part in PARTS:
        details = results.get("details", {}).get(part.name, {})
        for key, target in part.keys.items():
            if key not in results:
                continue
            values = results[key] if isinstance(results[key], dict) else {"": results[key]}
            for method, value in values.items():
                low, high = _spread(details, key, method)
                row = (f"{key} {method}".strip(), _shown(value), _shown(low), _shown(high), _aim(target))
                table.add_row(*row, style=None if target is None else ("green" if _met(value, target) else "red"))
    return table


def _spread(details: dict[str, Any], key: str, method: str) -> tuple[float | None, float | None]:
    """Return the least and the largest of a ratio's repetitions, where the part tells them."""
    spread = details.get("spread") or {}
    if method:
        spread = details.get("methods", {}).get(method, {}).get("seconds" if "seconds" in key else "memory", {})
    elif "low" not in spread:
        spread = spread.get(key) or spread.get("memory" if "rss" in key else "seconds", {})
    return spread.get("low"), spread.get("high")


def _met(value: float, target: float) -> bool:
    return value >= -target if target < 0 else value <= target


def _aim(target: float | None) -> str:
    return "" if target is None else f"≥ {-target:g}" if target < 0 else f"≤ {_shown(target)}"


def _shown(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value / 2**30:.2f} GiB" if abs(value) > 1e6 else f"{value:.3f}"


def _where() -> dict[str, Any]:
    """Return the machine, the day, and how busy it was with other things."""
    return {"date": datetime.now(UTC).date().isoformat(), "cores": os.cpu_count(), "load": list(os.getloadavg())}


if __name__ == "__main__":
    sys.exit(main())
