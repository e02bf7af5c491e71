"""Metrics, each as a row's statistics and a function from their sums to one number, higher is better.

A metric that is written so can be resampled: a bootstrap over rows is one product of counts with statistics, whatever
the metric. Lives here: the metrics that take a model's logits, and what they have in common. Does not live here:
metrics of one kind of task alone (`bmm.kinds`), intervals and shares (`bmm.evaluation.metrics`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bmm.errors import BMMError

Statistics = NDArray[np.float64]


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: the recipe's word for it.
        statistics: from a model's answers and the rows' labels to (rows, k); what they are is each metric's own.
        score: from statistics summed over rows, (..., k), to the metric, (...); 0 where it is not defined.
        also: further figures of the same sums, by name, for the record; not compared and not averaged.
    """

    name: str
    statistics: Callable[[Any, Sequence[Any]], Statistics]
    score: Callable[[Statistics], Any]
    also: Mapping[str, Callable[[Statistics], Any]] = field(default_factory=dict)


def ratio(numerator: Any, denominator: Any) -> Any:
    """Return numerator / denominator, and 0 where the denominator is 0."""
    denominator = np.asarray(denominator, dtype=np.float64)
    return np.divide(numerator, denominator, out=np.zeros(denominator.shape), where=denominator != 0)


def share(right: NDArray[Any]) -> Statistics:
    """Return the statistics of a share of rows: whether a row counts, and one, (rows, 2)."""
    flags = np.asarray(right, dtype=np.float64)
    return np.stack([flags, np.ones_like(flags)], axis=1)


def share_score(sums: Statistics) -> Any:
    """Return the share whose statistics were summed."""
    return ratio(sums[..., 0], sums[..., 1])


def predicted(logits: ArrayLike, labels: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Return predicted and true class ids, (rows,), and the number of classes; of equal logits the first counts.

    Raises:
        BMMError: the logits, (rows, classes), do not belong to the labels.
    """
    scores = np.asarray(logits)
    if scores.ndim != 2 or scores.shape[0] != len(labels):
        raise BMMError(f"logits of shape {scores.shape} do not belong to {len(labels)} labels")
    return scores.argmax(axis=1), np.asarray(labels, dtype=np.int64), scores.shape[1]


def _accuracy(logits: ArrayLike, labels: Sequence[int]) -> Statistics:
    found, true, _ = predicted(logits, labels)
    return share(found == true)


def _f1(logits: ArrayLike, labels: Sequence[int]) -> Statistics:
    """True and false positives and false negatives of class 1, (rows, 3)."""
    found, true, _ = predicted(logits, labels)
    return np.stack([(found == 1) & (true == 1), (found == 1) & (true != 1), (found != 1) & (true == 1)], 1).astype(
        np.float64
    )


def f1_score(sums: Statistics) -> Any:
    """Return `2 TP / (2 TP + FP + FN)`, the sums standing last."""
    return ratio(2 * sums[..., 0], 2 * sums[..., 0] + sums[..., 1] + sums[..., 2])


def _macro_f1(logits: ArrayLike, labels: Sequence[int]) -> Statistics:
    """The three of every class, (rows, 3 classes)."""
    found, true, classes = predicted(logits, labels)
    ours, theirs = (np.eye(classes, dtype=bool)[ids] for ids in (found, true))
    return np.stack([ours & theirs, ours & ~theirs, ~ours & theirs], axis=2).reshape(len(true), -1).astype(np.float64)


def _macro_f1_score(sums: Statistics) -> Any:
    """The mean over the classes that rows or answers have."""
    each = sums.reshape(*sums.shape[:-1], -1, 3)
    occurs = each.sum(axis=-1) > 0
    return ratio((f1_score(each) * occurs).sum(axis=-1), occurs.sum(axis=-1))


def _matthews(logits: ArrayLike, labels: Sequence[int]) -> Statistics:
    """One, whether a row is right, and its predicted and true class one-hot, (rows, 2 + 2 classes)."""
    found, true, classes = predicted(logits, labels)
    eye = np.eye(classes)
    return np.concatenate([share(found == true)[:, ::-1], eye[found], eye[true]], axis=1)


def _matthews_score(sums: Statistics) -> Any:
    """Gorodkin's R_K, which for two classes is the Matthews correlation coefficient."""
    rows, right = sums[..., 0], sums[..., 1]
    found, true = np.split(sums[..., 2:], 2, axis=-1)
    covariance = right * rows - (found * true).sum(-1)
    spread = (rows**2 - (found**2).sum(-1)) * (rows**2 - (true**2).sum(-1))
    return ratio(covariance, np.sqrt(np.maximum(spread, 0)))


def _pearson(answers: ArrayLike, labels: Sequence[float]) -> Statistics:
    """One, x, y, x², y² and xy of answers and labels about their means, (rows, 6)."""
    values = np.asarray(answers, dtype=np.float64)
    if values.shape not in ((len(labels),), (len(labels), 1)):
        raise BMMError(f"answers of shape {values.shape} do not belong to {len(labels)} labels")
    return _moments(values.reshape(-1), np.asarray(labels, dtype=np.float64))


def _spearman(answers: ArrayLike, labels: Sequence[float]) -> Statistics:
    """Those of the ranks among all rows (ties share their mean rank).

    A resample keeps these ranks: ranking each anew would be no sum over rows. The interval is that of Pearson's
    coefficient of the full sample's ranks, to which the two differ by what repeated rows add to ties.
    """
    from scipy.stats import rankdata

    values = np.asarray(answers, dtype=np.float64)
    if values.shape not in ((len(labels),), (len(labels), 1)):
        raise BMMError(f"answers of shape {values.shape} do not belong to {len(labels)} labels")
    return _moments(rankdata(values.reshape(-1)), rankdata(np.asarray(labels, dtype=np.float64)))


def _moments(x: NDArray[np.float64], y: NDArray[np.float64]) -> Statistics:
    # The coefficient does not know where zero is, and sums of squares about the mean lose no digits.
    x, y = x - x.mean(), y - y.mean()
    return np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1)


def _pearson_score(sums: Statistics) -> Any:
    rows, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    variances = (rows * xx - x * x) * (rows * yy - y * y)
    # What rounding leaves of a variance of zero is no variance.
    defined = variances > 1e-12 * rows**2 * xx * rows * yy
    return ratio((rows * xy - x * y) * defined, np.sqrt(np.where(defined, variances, 1.0)))


ACCURACY = Metric("accuracy", _accuracy, share_score)
CLASSIFICATION = {
    metric.name: metric
    for metric in (
        ACCURACY,
        Metric("f1", _f1, f1_score),
        Metric("f1-macro", _macro_f1, _macro_f1_score),
        Metric("matthews", _matthews, _matthews_score),
    )
}
"""Of logits `(rows, classes)` and class ids."""
REGRESSION = {
    metric.name: metric
    for metric in (Metric("pearson", _pearson, _pearson_score), Metric("spearman", _spearman, _pearson_score))
}
"""Of answers `(rows, 1)` and numbers."""
