"""`make benchmark-search`: searchers beside each other at equal evaluations, chosen on validation, judged on test rows.

    python -m benchmarks.searchers                            the project's own zoos
    python -m benchmarks.searchers --zoo mine=recipe.yaml     anybody's experts: a recipe with rows for all three splits

Module-wise regression around the recipe's anchor, on one draw of calibration rows; every searcher with several seeds of
its own, through the product's own stages. Beside them the best of a grid of one λ for all maps, and the anchor itself.
What is compared is what would be published: each searcher's recommended trial on the test rows, paired with the others.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from benchmarks.methods import where
from benchmarks.rows import MODULE_WISE, PROPAGATED, How, keeping_heads
from benchmarks.runs import Bench, Zoo
from benchmarks.summary import BOOTSTRAP
from benchmarks.trial_costs import trial_costs
from benchmarks.workers import share_out
from benchmarks.zoos import zoo_of
from rich.console import Console
from rich.table import Table

from bmm.errors import BMMError, UserError
from bmm.evaluation.metrics import Bootstrap, Measured, share_of_experts
from bmm.zoo.zoos import ZOOS

RESULTS = Path(__file__).parent / "results"
SEARCHERS = ("bayesian", "saas", "cma-es", "sobol", "random")
GRID = 12
BEST_GLOBAL = "best global λ"
ANCHOR = "anchor"


@dataclass(frozen=True)
class Job:
    """One search, or one point of the grid."""

    zoo: Zoo
    name: str
    seed: int
    how: How
    rows: int


@dataclass(frozen=True)
class Run:
    """What came of a job: the model's digest, and what its search says."""

    digest: str
    search: dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code: 1 where a run failed, 2 where the command is at fault."""
    said = _parser().parse_args(arguments)
    console = Console(stderr=True)
    try:
        zoos = [zoo_of(name, said.folder) for name in said.zoo or list(ZOOS)]
        results = {zoo.name: _zoo(zoo, said, console) for zoo in zoos}
    except UserError as error:
        console.print(f"error: {error}", markup=False, soft_wrap=True)
        return 2
    except BMMError as error:
        console.print(f"failed: {error}", markup=False, soft_wrap=True)
        return 1
    said.output.mkdir(parents=True, exist_ok=True)
    path = said.output / "search.json"
    path.write_text(json.dumps({**where(), "zoos": results}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, result in results.items():
        if result["rows"]:
            Console().print(table(name, result))
    console.print(str(path), markup=False, soft_wrap=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.searchers", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--zoo", action="append", help="text, vision, or NAME=RECIPE; may be repeated")
    parser.add_argument("--folder", type=Path, default=Path("demo/benchmark"), help="where experts and stores lie")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where search.json goes")
    parser.add_argument("--seeds", type=int, default=5, help="of each searcher")
    parser.add_argument("--rows", type=int, default=256, help="calibration rows a task")
    parser.add_argument("--trials", type=int, default=40, help="of each search")
    parser.add_argument("--per", default="type x depth", help="module groups, as search.per")
    parser.add_argument("--mode", choices=("module-wise", "propagated"), default="module-wise")
    parser.add_argument("--anchor", help="a method, as anchor.method; else the recipe's")
    parser.add_argument("--objective", help="as search.objective; else the recipe's default for its tasks")
    parser.add_argument("--only", action="append", choices=SEARCHERS, help="only this searcher; may be repeated")
    parser.add_argument("--costs", action="store_true", help="only what a trial and a proposal cost")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time")
    return parser


def _zoo(zoo: Zoo, said: argparse.Namespace, console: Console) -> dict[str, Any]:
    bench = Bench(zoo)
    experts = bench.references()["expert"]
    costs = trial_costs(bench, *bench.before_search(How(_changes(said), "both"), 0, said.rows))
    for name, found in costs.items():
        console.print(f"{zoo.name}: {name.replace('_', ' ')}: {found['median']:.3f}", markup=False, soft_wrap=True)
    if said.costs:
        return {"rows": [], "costs": costs}
    runs: dict[str, list[Run]] = {}
    jobs = _jobs(zoo, said)
    for done, (_, job, outcome) in enumerate(share_out(jobs, _run, said.processes), 1):
        if isinstance(outcome, str):
            raise BMMError(f"{job.name}, seed {job.seed}: {outcome}")
        runs.setdefault(job.name, []).append(outcome)
        console.print(f"[{done} of {len(jobs)}] {zoo.name}: {job.name}, seed {job.seed}", markup=False, soft_wrap=True)
    grid = runs.pop("grid")
    anchor = bench.merged(How(_changes(said), "anchor"), 0, said.rows)
    on_validation = {run.digest: bench.share(run.digest, "validation") for run in grid}
    best = max(grid, key=lambda run: on_validation[run.digest])
    models = {name: [run.digest for run in found] for name, found in runs.items()}
    models |= {BEST_GLOBAL: [best.digest], ANCHOR: [anchor]}
    validation = {
        name: mean(bench.share(digest, "validation") for digest in digests) for name, digests in models.items()
    }
    answers = {digest: bench.answers(digest) for digests in models.values() for digest in digests}
    goal = median(_best_after(run, said.trials) for run in runs["random"]) if "random" in runs else None
    return {
        "costs": costs,
        "rows": _rows(models, answers, experts, runs, validation, goal, said),
        "settings": {
            **{key: getattr(said, key) for key in ("seeds", "rows", "trials", "per", "mode")},
            "objective": next(run.search["objective"] for found in runs.values() for run in found),
            "anchor": _changes(said).get("anchor", bench.anchor),
            "grid": GRID,
            "test_rows": bench.rows("test"),
            "validation_rows": bench.rows("validation"),
            "kind": bench.kind,
        },
    }


def _changes(said: argparse.Namespace) -> dict[str, Any]:
    # Trials answer with the experts' heads, and what they chose is compared with these too.
    changes = dict(keeping_heads(MODULE_WISE if said.mode == "module-wise" else PROPAGATED))
    return changes if said.anchor is None else {**changes, "anchor": {"method": said.anchor}}


def _jobs(zoo: Zoo, said: argparse.Namespace) -> list[Job]:
    """Return every run: first the grid, which makes what all searches stand on."""
    jobs = []
    for exponent in np.linspace(-4, 2, GRID + 1)[:-1]:
        regression = {**_changes(said)["regression"], "lambda": float(f"{10**exponent:.6g}")}
        if said.mode == "propagated":
            regression["walk_lambda"] = 0.1
        changes = {**_changes(said), "regression": regression, "search": {"per": "model", "trials": 0}}
        jobs.append(Job(zoo, "grid", 0, How(changes, "search"), said.rows))
    for seed in range(said.seeds):
        for searcher in said.only or SEARCHERS:
            search = {"per": said.per, "trials": said.trials, "searcher": searcher, "seed": seed}
            if said.objective is not None:
                search["objective"] = said.objective
            jobs.append(Job(zoo, searcher, seed, How({**_changes(said), "search": search}, "search"), said.rows))
    return jobs


def _run(job: Job) -> Run | str:
    torch.set_num_threads(1)
    try:
        bench = Bench(job.zoo)
        digest = bench.merged(job.how, 0, job.rows)
        return Run(digest, bench.search_of(job.how, 0, job.rows))
    except BMMError as error:
        return f"{type(error).__name__}: {error}"


def _rows(
    models: Mapping[str, Sequence[str]],
    answers: Mapping[str, Mapping[str, Measured]],
    experts: Mapping[str, Measured],
    runs: Mapping[str, Sequence[Run]],
    validation: Mapping[str, float],
    goal: float | None,
    said: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Return a row for each searcher, with its paired difference to Bayesian optimisation."""
    measured = {
        task: {"expert": experts[task], **{digest: found[task] for digest, found in answers.items()}}
        for task in experts
    }
    bootstrap = Bootstrap(measured, **BOOTSTRAP)
    scores = {task: models["expert"].score for task, models in measured.items()}
    shares = {
        digest: share_of_experts({task: one.score for task, one in found.items()}, scores)
        for digest, found in answers.items()
    }
    rows = []
    for name, digests in models.items():
        interval = bootstrap.share_of_experts(*digests)
        row: dict[str, Any] = {
            "searcher": name,
            "evaluations": {BEST_GLOBAL: GRID, ANCHOR: 1}.get(name, said.trials),
            "share_of_experts": {
                "mean": mean(shares[digest] for digest in digests),
                "low": interval.low,
                "high": interval.high,
            },
            "by_seed": [shares[digest] for digest in digests],
            "validation": validation[name],
            "evaluations_to_random_best": None,
            "below_anchor_on_validation": None,
            "bayesian_minus_this": None,
        }
        if name in runs:
            if goal is not None:
                reached = [_evaluations_to(run, goal) for run in runs[name]]
                row["evaluations_to_random_best"] = median_reached(reached)
            row["below_anchor_on_validation"] = sum(_below_anchor(run) for run in runs[name])
            row["seen"] = mean(trial["seen"] for run in runs[name] for trial in run.search["trials"])
        if "bayesian" in models and name != "bayesian":
            row["bayesian_minus_this"] = _difference(models["bayesian"], digests, shares, bootstrap, scores)
        rows.append(row)
    return sorted(rows, key=lambda row: -float(row["share_of_experts"]["mean"]))


def _difference(
    ours: Sequence[str],
    theirs: Sequence[str],
    shares: Mapping[str, float],
    bootstrap: Bootstrap,
    experts: Mapping[str, float],
) -> dict[str, float]:
    """Return the mean over seeds of the difference in share, with the mean of its 95 % intervals over test rows."""
    pairs = list(zip(ours, theirs if len(theirs) > 1 else list(theirs) * len(ours), strict=True))
    scale = mean(experts.values())
    ends = [bootstrap.difference(one, other) for one, other in pairs]
    return {
        "mean": mean(shares[one] - shares[other] for one, other in pairs),
        "low": mean(interval.low for interval in ends) / scale,
        "high": mean(interval.high for interval in ends) / scale,
    }


def _objectives(run: Run) -> list[float]:
    return [trial["objective"] if trial["state"] == "complete" else -float("inf") for trial in run.search["trials"]]


def _best_after(run: Run, trials: int) -> float:
    return max(_objectives(run)[:trials])


def _evaluations_to(run: Run, goal: float) -> int | None:
    """Return how many trials a search took to measure as much as `goal`, or None."""
    return next((place for place, value in enumerate(_objectives(run), 1) if value >= goal), None)


def median_reached(reached: Sequence[int | None]) -> float | None:
    """Return the median over runs, of which some may never get there; None where half of them do not."""
    found = median(math.inf if count is None else float(count) for count in reached)
    return found if math.isfinite(found) else None


def _below_anchor(run: Run) -> bool:
    return bool(run.search["best"]["objective"] < run.search["trials"][0]["objective"])


def table(zoo: str, result: Mapping[str, Any]) -> Table:
    """Return one zoo's rows for a terminal, best first."""
    settings = result["settings"]
    anchor = settings["anchor"]["method"]
    drawn = Table(
        title=f"{zoo}: share of the experts' mean test score, %",
        caption=f"{settings['mode']} around {anchor}, per {settings['per']}, {settings['trials']} trials by "
        f"{settings['objective']}, {settings['seeds']} seeds of each searcher; validation: that share on validation "
        "rows; to random's best: median evaluations to random search's best value of the objective at its end",
        title_justify="left",
        caption_justify="left",
        box=None,
        pad_edge=False,
    )
    for name in ("searcher", "test", "95 % interval", "validation", "to random's best", "Bayesian minus this"):
        drawn.add_column(name, justify="left" if name == "searcher" else "right")
    for row in result["rows"]:
        share, apart = row["share_of_experts"], row["bayesian_minus_this"]
        drawn.add_row(
            row["searcher"],
            f"{100 * share['mean']:.1f}",
            f"{100 * share['low']:.1f} to {100 * share['high']:.1f}",
            f"{100 * row['validation']:.1f}",
            _evaluations_shown(row, settings["trials"]),
            ""
            if apart is None
            else f"{100 * apart['mean']:+.2f} ({100 * apart['low']:+.2f} to {100 * apart['high']:+.2f})",
        )
    return drawn


def _evaluations_shown(row: Mapping[str, Any], trials: int) -> str:
    if row["below_anchor_on_validation"] is None:
        return ""
    found = row["evaluations_to_random_best"]
    return f"> {trials}" if found is None else f"{found:g}"


if __name__ == "__main__":
    sys.exit(main())
