"""How far a classifier's probabilities can be believed: ECE, Brier score, negative log-likelihood, one temperature.

Everything here starts from log-probabilities `(rows, classes)`, float64, each row's exponentials adding up to one: of
one model (`log_softmax`) or of several that are averaged (`pooled`). Where logits come from, and what a row is, is not
known here.

* `nll`, negative log-likelihood: the mean over rows of `−log p(label)`, in nats.
* `brier`, Brier score: the mean over rows of `Σ_classes (p − 1[class = label])²`, between 0 and 2.
* `ece`, expected calibration error: rows are sorted into 15 bins of equal width by the probability of their first
  choice, `((b − 1)/15, b/15]`, and `Σ_b rows_b/rows · |accuracy_b − mean confidence_b|` is taken (Guo et al., arXiv
  1706.04599). Few rows make it too large even for a calibrated model, and a bootstrap's replicates larger again: read
  the interval of a difference between two models rather than that of one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax as _log_softmax
from scipy.special import logsumexp

from bmm.errors import BMMError

BINS = 15
"""Bins of the expected calibration error, as in the paper."""

TEMPERATURES = (0.05, 20.0)
"""Where a temperature is looked for."""

MEASURES = ("accuracy", "nll", "brier", "ece")

Array = NDArray[np.float64]
Models = Mapping[str, Mapping[str, Array]]
"""Model -> measure -> its value, or its values over resamples."""


def log_softmax(logits: ArrayLike) -> Array:
    """Return a model's log-probabilities from its logits `(rows, classes)`.

    Raises:
        BMMError: there is no row, there are fewer than two classes, or a logit is not finite.
    """
    scores = np.asarray(logits, dtype=np.float64)
    if scores.ndim != 2 or scores.shape[0] == 0 or scores.shape[1] < 2 or not np.isfinite(scores).all():
        raise BMMError(f"logits of shape {scores.shape} are not the finite scores of two or more classes")
    return np.asarray(_log_softmax(scores, axis=1))


def pooled(members: Sequence[Array]) -> Array:
    """Return the logarithm of the mean of several models' probabilities, each `(rows, classes)`."""
    return np.asarray(logsumexp(np.stack(members), axis=0) - np.log(len(members)))


def tempered(log_probabilities: Array, temperature: float) -> Array:
    """Return the logarithm of `p^(1/T) / Σ p^(1/T)`: for one model, the softmax of its logits over `T`."""
    return np.asarray(_log_softmax(log_probabilities / temperature, axis=1))


def fit_temperature(log_probabilities: Mapping[str, Array], labels: Mapping[str, Sequence[int]]) -> float:
    """Return the `T` that minimises the mean over tasks of the negative log-likelihood.

    One for all tasks, each weighted alike. The likelihood is convex in `1/T`, so it has one minimum over `log T`, which
    a bounded search finds. It may lie at a bound: every row right, or rows no better than chance.

    Args:
        log_probabilities: by task, `(rows, classes)`; of validation rows, never of those that are reported on.
        labels: by task, `(rows,)` class ids.
    """

    def objective(log_temperature: float) -> float:
        temperature = float(np.exp(log_temperature))
        losses = [
            -_of_labels(tempered(found, temperature), labels[task]).mean() for task, found in log_probabilities.items()
        ]
        return float(np.mean(losses))

    low, high = TEMPERATURES
    found = minimize_scalar(objective, bounds=(np.log(low), np.log(high)), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))


def row_terms(log_probabilities: Array, labels: Sequence[int]) -> Array:
    """Return what each row adds to the measures, `(rows, 3 + BINS)` float64.

    First whether it is right (of equal classes the first counts), its negative log-likelihood and its Brier score; then
    for each bin of confidence `right − confidence` if the row lies in it, else 0.

    Raises:
        BMMError: there is not one label for each row.
    """
    likelihoods = _of_labels(log_probabilities, labels)
    probabilities = np.exp(log_probabilities)
    rows = np.arange(len(probabilities))
    chosen = log_probabilities.argmax(axis=1)
    right = (chosen == np.asarray(labels)).astype(np.float64)
    confidence = probabilities[rows, chosen]
    misses = probabilities.copy()
    misses[rows, np.asarray(labels)] -= 1
    bins = np.zeros((len(rows), BINS))
    bins[rows, _bins(confidence)] = right - confidence
    terms = [right, -likelihoods, (misses**2).sum(axis=1)]
    return np.column_stack([*terms, bins])


def from_means(means: Array) -> dict[str, Array]:
    """Return each of `MEASURES`, `(...)`, from means over rows of `row_terms`, `(..., 3 + BINS)`."""
    gaps = np.asarray(np.abs(means[..., 3:]).sum(axis=-1))
    return dict(zip(MEASURES, (means[..., 0], means[..., 1], means[..., 2], gaps), strict=True))


def reliability(log_probabilities: Mapping[str, Array], labels: Mapping[str, Sequence[int]]) -> list[dict[str, float]]:
    """Return what a reliability diagram shows: each bin of confidence that holds a row, in order, tasks weighed alike.

    Args:
        log_probabilities: by task, `(rows, classes)`.
        labels: by task, `(rows,)` class ids.

    Returns:
        For each such bin its index `bin`, the share of rows in it, their mean `confidence` in the first choice and
        their `accuracy`. The shares add up to one.
    """
    sums = np.zeros((BINS, 3))
    for task, found in log_probabilities.items():
        confidence, right = np.exp(found.max(axis=1)), found.argmax(axis=1) == np.asarray(labels[task])
        rows = np.column_stack([np.ones(len(found)), confidence, right]) / (len(found) * len(log_probabilities))
        np.add.at(sums, _bins(confidence), rows)
    return [
        {"bin": place, "share": float(share), "confidence": float(sure / share), "accuracy": float(right / share)}
        for place, (share, sure, right) in enumerate(sums)
        if share
    ]


def compare(
    terms: Mapping[str, Mapping[str, Array]],
    resampled: Callable[[str, Array], Array],
    *,
    first: str,
    second: str,
    confidence: float,
) -> dict[str, Any]:
    """Return the measures of two models and their difference `second − first`, by task and as means over tasks.

    Args:
        terms: task -> model -> `row_terms`, of the same rows in order.
        resampled: gives means over resamples of a task's rows, `(samples, columns)`, of columns `(rows, columns)`; the
            resamples of a task are always the same.
        first: one model.
        second: the other.
        confidence: of the intervals.

    Returns:
        `{"tasks": {task: figures}, "mean": figures}`; figures are model or `"difference"` -> measure -> value and the
        percentile bootstrap's `low` and `high`, paired over models.
    """
    names = (first, second)
    exact: dict[str, Models] = {}
    replicates: dict[str, Models] = {}
    for task, models in terms.items():
        exact[task] = {name: from_means(models[name].mean(axis=0)) for name in names}
        replicates[task] = {name: from_means(resampled(task, models[name])) for name in names}
    tail = (1 - confidence) / 2

    def figure(value: Array, resamples: Array) -> dict[str, float]:
        low, high = np.quantile(resamples, [tail, 1 - tail])
        return {"value": float(value), "low": float(low), "high": float(high)}

    def figures(one: Models, many: Models) -> dict[str, Any]:
        found = {name: {what: figure(one[name][what], many[name][what]) for what in MEASURES} for name in names}
        found["difference"] = {
            what: figure(one[second][what] - one[first][what], many[second][what] - many[first][what])
            for what in MEASURES
        }
        return found

    return {
        "tasks": {task: figures(exact[task], replicates[task]) for task in terms},
        "mean": figures(_over_tasks(exact.values(), names), _over_tasks(replicates.values(), names)),
    }


def _over_tasks(found: Collection[Models], names: Sequence[str]) -> Models:
    return {
        name: {what: np.mean([models[name][what] for models in found], axis=0) for what in MEASURES} for name in names
    }


def _bins(confidence: Array) -> NDArray[np.intp]:
    """Return the bin of each row's confidence."""
    # Bins are closed on their right; a probability that rounding has put above one belongs to the last.
    return np.clip(np.ceil(confidence * BINS).astype(np.intp) - 1, 0, BINS - 1)


def _of_labels(log_probabilities: Array, labels: Sequence[int]) -> Array:
    if len(labels) != len(log_probabilities):
        raise BMMError(f"probabilities of {len(log_probabilities)} rows do not belong to {len(labels)} labels")
    return np.asarray(log_probabilities[np.arange(len(labels)), np.asarray(labels)])
