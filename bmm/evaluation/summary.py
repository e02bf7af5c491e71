"""What merge.json says of scores: the entry of each task and the row of each method, with their intervals.

The figures and their intervals are those of `bmm.evaluation.metrics`; drawing them is for `bmm.report`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bmm.errors import BMMError
from bmm.evaluation.metrics import Bootstrap, Measured, Measurements, share_of_experts


@dataclass(frozen=True)
class Method:
    """One row of the table of methods: its model's key among the arrays, its name and its settings."""

    model: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)


def summarise(measured: Measurements, *, samples: int, seed: int, confidence: float) -> dict[str, Any]:
    """Return the `metrics` part of merge.json for one split: one entry a task, and `mean` over tasks.

    Args:
        measured: needs the models base, expert, anchor and merged for every task; others are left out.
        samples: bootstrap resamples.
        seed: of the bootstrap.
        confidence: of the intervals.

    Raises:
        BMMError: an array is missing or of another length, or a task is called "mean".
        DataError: the experts' mean is not above 0.
    """
    names = ("base", "expert", "anchor", "merged")
    if "mean" in measured:
        raise BMMError("a task cannot be called 'mean', which is where the means over tasks stand; rename the expert")
    measured = {task: _picked(models, names, task) for task, models in measured.items()}
    bootstrap = Bootstrap(measured, samples=samples, seed=seed, confidence=confidence)
    exact = _scores(measured, names)
    metrics: dict[str, Any] = {
        task: {
            "metric": models["expert"].metric.name,
            "rows": len(models["expert"]),
            **{name: exact[name][task] for name in names},
            "intervals": {name: bootstrap.score(task, name).document() for name in names},
            **_also({name: models[name].also for name in names}),
        }
        for task, models in measured.items()
    }
    compared = ("base", "anchor", "merged")
    metrics["mean"] = {
        **{name: float(np.mean(list(exact[name].values()))) for name in names},
        "share_of_experts": {name: share_of_experts(exact[name], exact["expert"]) for name in compared},
        "intervals": {"share_of_experts": {name: bootstrap.share_of_experts(name).document() for name in compared}},
    }
    return metrics


def method_rows(
    measured: Measurements, methods: Sequence[Method], *, samples: int, seed: int, confidence: float
) -> list[dict[str, Any]]:
    """Return the `methods` rows of merge.json: base, experts, `methods` in order, last the merged model.

    Args:
        measured: needs base, expert, merged and the model of each of `methods` for every task.
        methods: the rows between the experts and the merged model.
        samples: bootstrap resamples.
        seed: of the bootstrap.
        confidence: of the intervals.

    Raises:
        BMMError: an array is missing or of another length.
        DataError: the experts' mean is not above 0.
    """
    rows = [Method("base", "base"), Method("expert", "experts"), *methods, Method("merged", "merged")]
    names = tuple(dict.fromkeys(row.model for row in rows))
    measured = {task: _picked(models, names, task) for task, models in measured.items()}
    bootstrap = Bootstrap(measured, samples=samples, seed=seed, confidence=confidence)
    exact = _scores(measured, names)
    document = []
    for row in rows:
        interval = bootstrap.share_of_experts(row.model)
        document.append(
            {
                "method": row.method,
                "settings": dict(row.settings),
                "tasks": exact[row.model],
                "mean": float(np.mean(list(exact[row.model].values()))),
                "share_of_experts": {
                    "mean": share_of_experts(exact[row.model], exact["expert"]),
                    "low": interval.low,
                    "high": interval.high,
                },
            }
        )
    return document


def _scores(measured: Measurements, names: Iterable[str]) -> dict[str, dict[str, float]]:
    """Return model -> task -> score."""
    return {name: {task: models[name].score for task, models in measured.items()} for name in names}


def _also(figures: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Turn model -> figure -> value round, into figure -> model -> value."""
    turned: dict[str, dict[str, float]] = {}
    for model, values in figures.items():
        for name, value in values.items():
            turned.setdefault(name, {})[model] = value
    return turned


def _picked(models: Mapping[str, Measured], names: Iterable[str], task: str) -> dict[str, Measured]:
    missing = [name for name in names if name not in models]
    if missing:
        raise BMMError(f"the task {task} has no result of the model '{missing[0]}'")
    return {name: models[name] for name in names}
