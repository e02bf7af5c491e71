"""Accuracy, shares of the experts, and how sure one can be of them.

Lives here: figures computed from boolean arrays that say which rows a model got right. Does not live here:
running models (`bmm.evaluation.model`) and drawing the figures (`bmm.report`).

Two summaries over tasks look alike and are not: the table reports `share_of_experts`, the ratio of means; the
search maximises `mean_ratio_to_expert`, the mean of ratios, so that a task on which everybody is poor counts
as much as any.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bmm.digest import digest_text
from bmm.errors import BMMError

Correct = Mapping[str, Mapping[str, NDArray[np.bool_]]]
"""Task -> model -> which rows it got right, (rows,); all models of a task over the same rows in order."""

_COUNTS_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Interval:
    """A figure between its two ends."""

    low: float
    high: float

    def document(self) -> list[float]:
        """Return `[low, high]`."""
        return [self.low, self.high]


@dataclass(frozen=True)
class Method:
    """One row of the table of methods: its model's key among the arrays, its name and its settings."""

    model: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)


def correct_rows(logits: ArrayLike, labels: Sequence[int]) -> NDArray[np.bool_]:
    """Return which rows are classified correctly, (rows,); of equal logits the first class counts.

    Args:
        logits: (rows, classes), an array or a tensor on the CPU.
        labels: (rows,) class ids.
    """
    scores = np.asarray(logits)
    if scores.ndim != 2 or scores.shape[0] != len(labels):
        raise BMMError(f"logits of shape {scores.shape} do not belong to {len(labels)} labels")
    return np.asarray(scores.argmax(axis=1) == np.asarray(labels))


def accuracy(correct: NDArray[np.bool_]) -> float:
    """Return the share of rows that are correct, between 0 and 1."""
    return float(np.mean(correct))


def share_of_experts(model: Mapping[str, float], expert: Mapping[str, float]) -> float:
    """Return the model's mean accuracy over tasks divided by the experts' mean: the figure of the table.

    Raises:
        BMMError: every expert has accuracy 0.
    """
    return float(_share(*(_column(values, expert) for values in (model, expert))))


def mean_ratio_to_expert(model: Mapping[str, float], expert: Mapping[str, float]) -> float:
    """Return the mean over tasks of model accuracy / expert accuracy: what the search maximises.

    Raises:
        BMMError: an expert has accuracy 0.
    """
    for task, value in expert.items():
        if value == 0:
            raise BMMError(
                f"the expert of {task} has accuracy 0, so that nothing can be a share of it; check its data and labels"
            )
    return float(np.mean([model[task] / value for task, value in expert.items()]))


class Bootstrap:
    """Percentile bootstrap over rows, paired: one resample of a task's rows serves all of its models.

    Each task draws from its own stream, seeded by `seed` and the task's name, so that further models or tasks
    leave the intervals of the others as they are. A resample is a multinomial count for each row, so that
    `samples` accuracies are one product `(samples, rows) x (rows, models)`, done in pieces of bounded memory.
    """

    def __init__(self, correct: Correct, *, samples: int, seed: int, confidence: float) -> None:
        _check(correct)
        self._confidence = confidence
        self._replicates = {task: _resample(models, task, samples, seed) for task, models in correct.items()}

    def accuracy(self, task: str, model: str) -> Interval:
        """Return the interval of one model's accuracy on one task."""
        return self._interval(self._replicates[task][model])

    def mean(self, model: str) -> Interval:
        """Return the interval of a model's mean accuracy over tasks."""
        return self._interval(self._means(model))

    def share_of_experts(self, model: str, expert: str = "expert") -> Interval:
        """Return that of `share_of_experts`; resamples in which all experts have accuracy 0 are left out.

        Raises:
            BMMError: there is no other resample.
        """
        experts = self._means(expert)
        usable = experts > 0
        return self._interval(_share_of_means(self._means(model)[usable], experts[usable]))

    def difference(self, model: str, other: str, task: str | None = None) -> Interval:
        """Return the paired interval of accuracy(model) - accuracy(other), on one task or their mean."""
        if task is not None:
            return self._interval(self._replicates[task][model] - self._replicates[task][other])
        return self._interval(self._means(model) - self._means(other))

    def _means(self, model: str) -> NDArray[np.float64]:
        stacked = np.stack([replicates[model] for replicates in self._replicates.values()])
        return np.asarray(stacked.mean(axis=0), dtype=np.float64)

    def _interval(self, replicates: NDArray[np.float64]) -> Interval:
        tail = (1 - self._confidence) / 2
        low, high = np.quantile(replicates, [tail, 1 - tail])
        return Interval(float(low), float(high))


def summarise(correct: Correct, *, samples: int, seed: int, confidence: float) -> dict[str, Any]:
    """Return the `metrics` part of merge.json for one split: one entry a task, and `mean` over tasks.

    Args:
        correct: needs the models base, expert, anchor and merged for every task; others are left out.
        samples: bootstrap resamples.
        seed: of the bootstrap.
        confidence: of the intervals.

    Raises:
        BMMError: an array is missing or of another length, a task is called "mean", or all experts have
            accuracy 0.
    """
    names = ("base", "expert", "anchor", "merged")
    if "mean" in correct:
        raise BMMError("a task cannot be called 'mean', which is where the means over tasks stand; rename the expert")
    correct = {task: _picked(models, names, task) for task, models in correct.items()}
    bootstrap = Bootstrap(correct, samples=samples, seed=seed, confidence=confidence)
    exact = _accuracies(correct, names)
    metrics: dict[str, Any] = {
        task: {
            "metric": "accuracy",
            "rows": len(models["expert"]),
            **{name: exact[name][task] for name in names},
            "intervals": {name: bootstrap.accuracy(task, name).document() for name in names},
        }
        for task, models in correct.items()
    }
    compared = ("base", "anchor", "merged")
    metrics["mean"] = {
        **{name: float(np.mean(list(exact[name].values()))) for name in names},
        "share_of_experts": {name: share_of_experts(exact[name], exact["expert"]) for name in compared},
        "intervals": {"share_of_experts": {name: bootstrap.share_of_experts(name).document() for name in compared}},
    }
    return metrics


def method_rows(
    correct: Correct, methods: Sequence[Method], *, samples: int, seed: int, confidence: float
) -> list[dict[str, Any]]:
    """Return the `methods` rows of merge.json: base, experts, `methods` in order, last the merged model.

    Args:
        correct: needs base, expert, merged and the model of each of `methods` for every task.
        methods: the rows between the experts and the merged model.
        samples: bootstrap resamples.
        seed: of the bootstrap.
        confidence: of the intervals.

    Raises:
        BMMError: an array is missing or of another length, or all experts have accuracy 0.
    """
    rows = [Method("base", "base"), Method("expert", "experts"), *methods, Method("merged", "merged")]
    names = tuple(dict.fromkeys(row.model for row in rows))
    correct = {task: _picked(models, names, task) for task, models in correct.items()}
    bootstrap = Bootstrap(correct, samples=samples, seed=seed, confidence=confidence)
    exact = _accuracies(correct, names)
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


def _resample(
    models: Mapping[str, NDArray[np.bool_]], task: str, samples: int, seed: int
) -> dict[str, NDArray[np.float64]]:
    """Return the accuracies (samples,) of every model of one task over the same resamples of its rows."""
    stacked = np.stack([np.asarray(correct, dtype=np.float64) for correct in models.values()], axis=1)
    rows = len(stacked)
    generator = np.random.default_rng([seed, int(digest_text(task)[:16], 16)])
    chunk = max(1, _COUNTS_BYTES // (8 * rows))
    pieces = []
    for start in range(0, samples, chunk):
        counts = generator.multinomial(rows, np.full(rows, 1 / rows), size=min(chunk, samples - start))
        # Sums of whole numbers are exact in float64, so neither the chunk nor the order of the product
        # matters.
        pieces.append(counts.astype(np.float64) @ stacked / rows)
    replicates = np.concatenate(pieces)
    return {name: replicates[:, column] for column, name in enumerate(models)}


def _share(model: NDArray[np.float64], expert: NDArray[np.float64]) -> float:
    return float(_share_of_means(np.mean(model), np.mean(expert)))


def _share_of_means(model: Any, expert: Any) -> Any:
    if np.size(expert) == 0 or np.any(expert == 0):
        raise BMMError(
            "the experts' mean accuracy is 0, so that nothing can be a share of it; check their data and labels"
        )
    return model / expert


def _column(values: Mapping[str, float], tasks: Iterable[str]) -> NDArray[np.float64]:
    return np.array([values[task] for task in tasks], dtype=np.float64)


def _accuracies(correct: Correct, names: Iterable[str]) -> dict[str, dict[str, float]]:
    """Return model -> task -> accuracy."""
    return {name: {task: accuracy(models[name]) for task, models in correct.items()} for name in names}


def _picked(models: Mapping[str, NDArray[np.bool_]], names: Iterable[str], task: str) -> dict[str, NDArray[np.bool_]]:
    missing = [name for name in names if name not in models]
    if missing:
        raise BMMError(f"the task {task} has no result of the model '{missing[0]}'")
    return {name: models[name] for name in names}


def _check(correct: Correct) -> None:
    """Refuse anything that could not be resampled in pairs."""
    if not correct:
        raise BMMError("there is no task to summarise")
    for task, models in correct.items():
        shapes = {np.shape(array) for array in models.values()}
        if len(shapes) != 1 or len(next(iter(shapes))) != 1 or 0 in next(iter(shapes)):
            raise BMMError(f"the models of the task {task} were not run over the same rows: shapes {sorted(shapes)}")
        for name, array in models.items():
            if np.asarray(array).dtype != np.bool_:
                raise BMMError(f"the result of '{name}' on the task {task} is not an array of booleans")
