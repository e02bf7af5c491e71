"""What a merge.json says of its search, in plain words and numbers; drawn in search_figures.py.

Pure functions of the document, as in findings.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from statistics import correlation
from typing import Any

from bmm.report import findings, notation
from bmm.report.findings import Document

_FEW_TRIALS = 6
# Weaker ones come by chance among some twenty trials.
_OPPOSED = -0.4


def objective_scale(document: Document) -> float:
    """Return what the search's objective is multiplied by to be shown: 100 for shares, 1 for nats."""
    return 100.0 if _objective(document) == "share-of-expert" else 1.0


def objective_axis(document: Document) -> str:
    """Return what the axis of the search's objective says, in two lines."""
    return {
        "nll": "log-likelihood of the labels,\nnats a row",
        "agreement": "agreement with the experts,\nnats a row (0: the same)",
    }.get(_objective(document), "share of the experts'\nvalidation score, %")


def objective_text(document: Document, value: float) -> str:
    """Return a value of the search's objective in words."""
    return {
        "nll": f"a log-likelihood of {notation.decimals(value, 3)} nats a row",
        "agreement": f"an agreement of {notation.decimals(value, 3)} nats a row with the experts",
    }.get(
        _objective(document), f"{notation.percent(value)} of the experts' validation {findings.metric_word(document)}"
    )


def shares_text(document: Document, index: int, anchor: Mapping[str, Any] | None) -> str:
    """Return what a trial keeps by the tasks' metric, where that is not what was searched by; else nothing."""
    search = document.get("search") or {}
    trial = next((trial for trial in findings.finished_trials(document) if trial["index"] == index), None)
    found = None if trial is None else mean_and_worst(document, trial)
    if found is None or _objective(document) == "share-of-expert" or search.get("split") == "unlabelled":
        return ""
    said = f"; by {findings.metric_word(document)} it keeps {notation.percent(found[0])} of the experts"
    beside = None if anchor is None or anchor["index"] == index else mean_and_worst(document, anchor)
    return said + ("" if beside is None else f" (the anchor {notation.percent(beside[0])})")


def _objective(document: Document) -> str:
    return str((document.get("search") or {}).get("objective") or "share-of-expert")


def mean_and_worst(document: Document, trial: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return the mean and the least of a trial's tasks' shares of their experts' metric; None where there are none."""
    experts = (document.get("search") or {}).get("expert") or {}
    shares = [value / experts[task] for task, value in (trial.get("tasks") or {}).items() if experts.get(task)]
    return (sum(shares) / len(shares), min(shares)) if shares else None


def front(pairs: Mapping[int, tuple[float, float]]) -> list[int]:
    """Return the indices of the pairs that no other pair beats in both figures."""
    return [
        index
        for index, (mean, worst) in pairs.items()
        if not any((m >= mean and w >= worst) and (m, w) != (mean, worst) for m, w in pairs.values())
    ]


def comparable_trials(document: Document) -> list[Mapping[str, Any]]:
    """Return the trials that saw all rows of two or more tasks; none where they are too few to say anything of."""
    trials = [trial for trial in findings.finished_trials(document) if trial.get("state") != "stopped"]
    trials = [trial for trial in trials if len(trial.get("tasks") or {}) > 1]
    return trials if len(trials) >= _FEW_TRIALS else []


def further_text(setting: Mapping[str, Any]) -> str:
    """Return what a setting says beyond λ and γ: `anchor scale 0.9, ρ 0.3, news × 1.2`."""
    said = [
        f"{name} {setting[key]:.3g}" for key, name in (("anchor_scale", "anchor scale"), ("rho", "ρ")) if key in setting
    ]
    said += [f"{task} × {weight:.3g}" for task, weight in (setting.get("task_weights") or {}).items()]
    return ", ".join(said)


def opposed_tasks(document: Document) -> tuple[str, str, float] | None:
    """Return the two tasks that trials trade against each other most, with the correlation of their scores.

    It is None where no two tasks are opposed.
    """
    trials = comparable_trials(document)
    if not trials:
        return None
    scores = {task: [trial["tasks"][task] for trial in trials] for task in trials[0]["tasks"]}
    varied = {task: values for task, values in scores.items() if len(set(values)) > 1}
    found = [(correlation(varied[one], varied[other]), one, other) for one, other in combinations(sorted(varied), 2)]
    if not found or min(found)[0] > _OPPOSED:
        return None
    value, one, other = min(found)
    return one, other, value
