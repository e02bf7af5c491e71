"""`make benchmark-methods`: all methods on all zoos, in one table.

    python -m benchmarks.methods                            the project's own zoos
    python -m benchmarks.methods --zoo mine=recipe.yaml     anybody's experts: a recipe with rows for all three splits

Everything is made through the product's own stages and kept in its store, so that a killed benchmark carries on where
it stopped, and a row that is there already costs nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from benchmarks import rows_figure, summary
from benchmarks.rows import Row, rows, sweep
from benchmarks.runs import Bench, Model, Zoo
from benchmarks.summary import Found
from benchmarks.workers import share_out
from benchmarks.zoos import zoo_of
from rich.console import Console

from bmm.errors import BMMError, UserError
from bmm.zoo.zoos import ZOOS

RESULTS = Path(__file__).parent / "results"
COUNTS = (16, 64, 256, 1024)


@dataclass(frozen=True)
class Job:
    """One method on one draw of calibration rows."""

    zoo: Zoo
    row: Row
    seed: int
    rows: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code: 1 where a row could not be made, 2 where the command is at fault."""
    said = _parser().parse_args(arguments)
    if said.quick:
        said.seeds, said.rows, said.trials = 1, min(said.rows, 64), min(said.trials, 4)
    console = Console(stderr=True)
    started = perf_counter()
    try:
        names = said.zoo or (["text"] if said.quick else list(ZOOS))
        zoos = [zoo_of(name, said.folder) for name in names]
        results = {zoo.name: _zoo(zoo, said, console) for zoo in zoos}
    except UserError as error:
        console.print(f"error: {error}", markup=False, soft_wrap=True)
        return 2
    document = {**where(), "how": summary.HOW, "quick": said.quick, "zoos": results}
    said.output.mkdir(parents=True, exist_ok=True)
    path = said.output / "methods.json"
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    failed = _show(results, Console())
    console.print(f"{path}, after {perf_counter() - started:.0f} s", markup=False, soft_wrap=True)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.methods", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--zoo", action="append", help="text, vision, or NAME=RECIPE; may be repeated")
    parser.add_argument("--folder", type=Path, default=Path("demo/benchmark"), help="where experts and stores lie")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where methods.json goes")
    parser.add_argument("--seeds", type=int, default=3, help="draws of calibration rows")
    parser.add_argument("--rows", type=int, default=256, help="calibration rows a task")
    parser.add_argument("--trials", type=int, default=16, help="of each search")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1), help="runs at a time")
    parser.add_argument("--only", action="append", metavar="METHOD", help="only the rows of this name; may be repeated")
    parser.add_argument(
        "--quick", action="store_true", help="the text zoo, one draw of 64 rows, 4 trials, no chosen scales"
    )
    parser.add_argument("--rows-figure", action="store_true", help="also draw accuracy against calibration rows")
    return parser


def _zoo(zoo: Zoo, said: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run all rows on one zoo and return its part of the results."""
    known = rows(said.trials, quick=said.quick)
    odd = sorted(set(said.only or ()) - {row.method for row in known})
    if odd:
        raise UserError(f"there is no row '{odd[0]}'; choose from {', '.join(row.method for row in known)}")
    wanted = [row for row in known if not said.only or row.method in said.only]
    bench = _bench(zoo)
    references = bench.references()
    # The long ones first, so that no process is idle at the end.
    jobs = [
        Job(zoo, row, seed, said.rows if said.quick else row.rows or said.rows)
        for row in reversed(wanted)
        for seed in range(said.seeds if row.seeded else 1)
    ]
    models, failures = _run(jobs, said.processes, console)
    found = []
    for row in wanted:
        own = [model for job, model in models if job.row == row]
        if own:
            answers = tuple(bench.answers(model.digest) for model in own)
            found.append(Found(row, answers, tuple(model.seconds for model in own)))
    documents = summary.documents(references, found)
    result: dict[str, Any] = {
        "rows": documents,
        "targets": summary.targets(documents, bench.kind),
        "failures": failures,
        "settings": {
            "rows": said.rows,
            "seeds": said.seeds,
            "trials": said.trials,
            "anchor": bench.anchor,
            "test_rows": bench.rows("test"),
            "validation_rows": bench.rows("validation"),
            "pool": bench.rows("calibration"),
        },
    }
    if said.rows_figure:
        result["over_rows"] = _over_rows(bench, said, console)
        published = [row for row in documents if row["merged"] and not row["ours"]]
        best = max(published, key=lambda row: row["share_of_experts"]["mean"], default=None)
        line = (best["method"], best["share_of_experts"]["mean"]) if best else None
        rows_figure.write(said.output / f"rows-{zoo.name}.png", zoo.name, result["over_rows"], line)
    return result


def _over_rows(bench: Bench, said: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Return, by method, the shares of the experts at each number of calibration rows."""
    most = max(bench.rows("calibration").values())
    counts = [count for count in COUNTS if count <= (min(said.rows, most) if said.quick else most)]
    jobs = [Job(bench.zoo, row, seed, count) for count in counts for row in sweep() for seed in range(said.seeds)]
    models, failures = _run(jobs, said.processes, console)
    if failures:
        raise BMMError(f"the figure lacks points: {failures[0]['why']}")
    points: dict[str, list[dict[str, Any]]] = {row.method: [] for row in sweep()}
    references = bench.references()
    for row in sweep():
        for count in counts:
            own = [model for job, model in models if (job.row.method, job.rows) == (row.method, count)]
            answers = tuple(bench.answers(model.digest) for model in own)
            document = summary.documents(references, [Found(row, answers, tuple(model.seconds for model in own))])[-1]
            points[row.method].append(
                {"rows": count, **{key: document[key] for key in ("share_of_experts", "by_seed")}}
            )
    return points


def _run(jobs: Sequence[Job], processes: int, console: Console) -> tuple[list[tuple[Job, Model]], list[dict[str, Any]]]:
    """Run jobs; return the models in the order of the jobs, and what went wrong."""
    models: dict[int, Model] = {}
    failures = []
    work = _merge if processes == 1 else _merge_beside
    for done, (index, job, outcome) in enumerate(share_out(jobs, work, processes), 1):
        name = f"{job.zoo.name}: {job.row.method}, {job.rows} rows, draw {job.seed}"
        if isinstance(outcome, Model):
            models[index] = outcome
            console.print(f"[{done} of {len(jobs)}] {name}, {outcome.seconds:.1f} s", markup=False, soft_wrap=True)
        else:
            failures.append({"method": job.row.method, "seed": job.seed, "rows": job.rows, "why": outcome})
            console.print(f"[{done} of {len(jobs)}] {name} FAILED: {outcome}", markup=False, soft_wrap=True)
    return [(jobs[index], models[index]) for index in sorted(models)], failures


def _merge(job: Job) -> Model | str:
    """Run one job; a failure of one method must not cost the table the others."""
    try:
        return _bench(job.zoo).run(job.row, job.seed, job.rows)
    except BMMError as error:
        return f"{type(error).__name__}: {error}"


def _merge_beside(job: Job) -> Model | str:
    """Run one job on one core, beside others."""
    torch.set_num_threads(1)
    return _merge(job)


@cache
def _bench(zoo: Zoo) -> Bench:
    return Bench(zoo)


def _show(results: dict[str, Any], console: Console) -> bool:
    """Print the tables; return whether a row is missing."""
    failed = False
    for name, result in results.items():
        console.print(summary.table(name, result))
        for aim in result["targets"]:
            console.print(summary.verdict(aim), markup=False, style="green" if aim["met"] else "red")
        for failure in result["failures"]:
            failed = True
            console.print(f"no row for {failure['method']}: {failure['why']}", markup=False, style="red")
        console.print()
    return failed


def where() -> dict[str, Any]:
    """Return the machine, the day and the versions that decide numbers."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "system": platform.platform()},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("bayesian-model-merging", "torch", "transformers", "botorch", "numpy")},
        },
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    sys.exit(main())
