"""From answers to the table: shares of the experts with their intervals, what was aimed at, what a person reads.

The interval of a method says what one merge may show: each of its resamples draws the test rows of every task anew (the
same draw for all methods and for the experts: `bmm.evaluation.metrics.Bootstrap`) and takes the model of one draw of
calibration rows, each as often as the others. `low` and `high` are the 2.5th and 97.5th percentile of those, so they
hold both the test rows and the calibration rows, but not the choice of experts and tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median, stdev
from typing import Any

from benchmarks.rows import Row
from rich.table import Table
from rich.text import Text

from bmm.evaluation.metrics import Bootstrap, Measured, share_of_experts

Answers = Mapping[str, Measured]
BOOTSTRAP = {"samples": 2000, "seed": 0, "confidence": 0.95}
HOW = (
    "mean: over the draws of calibration rows; low, high: 2.5th and 97.5th percentile of a bootstrap over test rows, "
    "paired over methods, pooled over the draws; seconds: median, from the experts to the merged weights"
)
# By kind of task: the least share of the experts, and the least margin over the best anchor method.
TARGETS = {"text-classification": (0.99, 0.01), "image-classification": (0.98, 0.05)}


@dataclass(frozen=True)
class Found:
    """One method's models, one for each draw of calibration rows (one in all where it does not depend on them)."""

    row: Row
    answers: tuple[Answers, ...]
    seconds: tuple[float, ...]


def documents(references: Mapping[str, Answers], found: Sequence[Found]) -> list[dict[str, Any]]:
    """Return the rows of the results: experts, base, then every method in its order.

    Args:
        references: the test answers by task of `expert` and `base`.
        found: the methods.
    """
    measured: dict[str, dict[str, Measured]] = {
        task: {name: answers[task] for name, answers in references.items()} for task in references["expert"]
    }
    for index, method in enumerate(found):
        for draw, answers in enumerate(method.answers):
            for task, own in answers.items():
                measured[task][f"{index}/{draw}"] = own
    bootstrap = Bootstrap(measured, **BOOTSTRAP)
    experts = {task: models["expert"].score for task, models in measured.items()}

    def document(name: str, models: Sequence[str], seconds: Sequence[float], **said: Any) -> dict[str, Any]:
        scores = [{task: measured[task][model].score for task in measured} for model in models]
        shares = [share_of_experts(one, experts) for one in scores]
        interval = bootstrap.share_of_experts(*models)
        return {
            "method": name,
            **said,
            "share_of_experts": {"mean": mean(shares), "low": interval.low, "high": interval.high},
            "seconds": median(seconds),
            "by_seed": shares,
            "spread": stdev(shares) if len(shares) > 1 else None,
            "mean": mean(mean(one.values()) for one in scores),
            "tasks": {task: mean(one[task] for one in scores) for task in measured},
        }

    nothing = {
        "ours": False,
        "anchor": False,
        "data_free": True,
        "seeded": False,
        "chosen_on_validation": False,
        "aimed": False,
        "merged": False,
    }
    rows = [
        document("experts, one a task", ["expert"], [0.0], **nothing),
        document("base with the experts' heads", ["base"], [0.0], **nothing),
    ]
    for index, method in enumerate(found):
        row = method.row
        said = {
            "ours": row.ours,
            "anchor": row.anchor,
            "data_free": row.data_free,
            "seeded": row.seeded,
            "chosen_on_validation": row.chosen,
            "aimed": row.aimed,
            "merged": True,
        }
        models = [f"{index}/{draw}" for draw in range(len(method.answers))]
        rows.append(document(row.method, models, method.seconds, **said))
    return rows


def targets(rows: Sequence[Mapping[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Return what was aimed at, and whether it was reached; nothing of rows that are not there.

    Args:
        rows: as `documents` returns them.
        kind: of the zoo's tasks.
    """
    share = {row["method"]: row["share_of_experts"]["mean"] for row in rows if row["merged"]}
    anchors = {row["method"] for row in rows if row["anchor"]}
    peers = {row["method"] for row in rows if row["merged"] and not row["ours"]}
    free = {row["method"] for row in rows if row["merged"] and row["data_free"]}
    least, margin = TARGETS.get(kind, (0.98, 0.0))
    aims: list[dict[str, Any]] = []

    def aim(ours: str, target: float, what: str) -> None:
        aims.append(
            {"method": ours, "what": what, "target": target, "found": share[ours], "met": share[ours] >= target}
        )

    best = max(anchors, key=share.__getitem__, default=None)
    for name in (row["method"] for row in rows if row["aimed"]):
        aim(name, least, f"{least:.0%} of the experts")
        if best:
            aim(name, share[best] + margin, f"{100 * margin:g} points above {best}, the best anchor")
    if "module-wise, searched" in share and best:
        aim("module-wise, searched", share[best], f"{best}, the best anchor")
    best = max(peers & free, key=share.__getitem__, default=None)
    for name in sorted(free - peers):
        if best:
            aim(name, share[best], f"{best}, the best published method without data")
    return aims


def table(zoo: str, document: Mapping[str, Any]) -> Table:
    """Return one zoo's rows for a terminal of 80 columns, best first; ours are highlighted."""
    settings = document["settings"]
    counts = sorted(set(settings["test_rows"].values()))
    between = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    drawn = Table(
        title=Text(f"{zoo}: share of the experts' mean test score, %", style="bold"),
        caption=Text(
            f"{len(settings['test_rows'])} tasks, {between} test rows each; {settings['rows']} calibration rows a task "
            f"in {settings['seeds']} draws, ± their standard deviation. What a method sees besides weights: "
            "cal, calibration rows; val, validation rows."
        ),
        title_justify="left",
        caption_justify="left",
        box=None,
        pad_edge=False,
        width=80,
    )
    drawn.add_column("method", ratio=1)
    for name in ("share", "95 % interval", "±", "seconds"):
        drawn.add_column(name, justify="right", no_wrap=True)
    drawn.add_column("sees", no_wrap=True)
    for row in sorted(document["rows"], key=lambda row: (row["merged"], -row["share_of_experts"]["mean"])):
        found = row["share_of_experts"]
        cells = (
            row["method"],
            f"{100 * found['mean']:.1f}",
            f"{100 * found['low']:.1f} to {100 * found['high']:.1f}" if found["low"] < found["high"] else "",
            "" if row["spread"] is None else f"{100 * row['spread']:.2f}",
            f"{row['seconds']:.1f}" if row["merged"] else "",
            _sees(row),
        )
        drawn.add_row(*map(Text, cells), style="bold cyan" if row["ours"] else None)
    return drawn


def _sees(row: Mapping[str, Any]) -> str:
    return "+".join(word for word, does in (("cal", row["seeded"]), ("val", row["chosen_on_validation"])) if does)


def verdict(aim: Mapping[str, Any]) -> str:
    """Return one target as a sentence."""
    word = "reached" if aim["met"] else "MISSED"
    return f"{aim['method']}: {100 * aim['found']:.1f} %; target {100 * aim['target']:.1f} % ({aim['what']}): {word}"
