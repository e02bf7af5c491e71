"""Scores, shares of the experts, and how sure one can be of them.

Lives here: figures computed from the statistics of rows, whatever the metric. Does not live here: the metrics
(`bmm.evaluation.scores`), running models (`bmm.evaluation.model`) and the figures as merge.json has them
(`bmm.evaluation.summary`).

Two summaries over tasks look alike and are not: the table reports `share_of_experts`, the ratio of means; a
search by `share-of-expert` maximises `mean_ratio_to_expert`, the mean of ratios, so that a task on which everybody
is poor counts as much as any.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bmm.digest import digest_text
from bmm.errors import BMMError, DataError
from bmm.evaluation.scores import Metric, Statistics


@dataclass(frozen=True)
class Measured:
    """What one model answered on the rows of one task: the metric's statistics, (rows, k) float64."""

    metric: Metric
    statistics: Statistics

    def __len__(self) -> int:
        return len(self.statistics)

    @property
    def score(self) -> float:
        """The metric over all rows."""
        return float(self.metric.score(self.statistics.sum(axis=0)))

    @property
    def variance(self) -> float:
        """The score's variance over draws of the rows, by the jackknife (Efron, 1982); 0 for a single row."""
        count = len(self)
        if count < 2:
            return 0.0
        left_out = np.asarray(self.metric.score(self.statistics.sum(axis=0) - self.statistics), dtype=np.float64)
        return float((count - 1) / count * np.square(left_out - left_out.mean()).sum())

    @property
    def also(self) -> dict[str, float]:
        """The metric's further figures over all rows."""
        sums = self.statistics.sum(axis=0)
        return {name: float(figure(sums)) for name, figure in self.metric.also.items()}


Measurements = Mapping[str, Mapping[str, Measured]]
"""Task -> model -> its measured answers; all models of a task by one metric over the same rows in order."""

_COUNTS_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Interval:
    """A figure between its two ends."""

    low: float
    high: float

    def document(self) -> list[float]:
        """Return `[low, high]`."""
        return [self.low, self.high]


def share_of_experts(model: Mapping[str, float], expert: Mapping[str, float]) -> float:
    """Return the model's mean score over tasks divided by the experts' mean: the figure of the table.

    Raises:
        DataError: the experts' mean is not above 0.
    """
    return float(_share(*(_column(values, expert) for values in (model, expert))))


def mean_ratio_to_expert(model: Mapping[str, float], expert: Mapping[str, float]) -> float:
    """Return the mean over tasks of model score / expert score.

    Raises:
        DataError: an expert's score is not above 0.
    """
    for task, value in expert.items():
        if not value > 0:
            raise DataError(
                f"the expert of {task} has the score {value:g}, so that nothing can be a share of it; "
                "check its data and labels"
            )
    return float(np.mean([model[task] / value for task, value in expert.items()]))


class Bootstrap:
    """Percentile bootstrap over rows, paired: one resample of a task's rows serves all of its models.

    Each task draws from its own stream, seeded by `seed` and the task's name, so that further models or tasks
    leave the intervals of the others as they are. A resample is a multinomial count for each row, so that
    `samples` sums of statistics are one product `(samples, rows) x (rows, k)`, done in pieces of bounded memory.
    """

    def __init__(self, measured: Measurements, *, samples: int, seed: int, confidence: float) -> None:
        _check(measured)
        self._confidence = confidence
        self._replicates = {task: _resample(models, task, samples, seed) for task, models in measured.items()}

    def score(self, task: str, model: str) -> Interval:
        """Return the interval of one model's score on one task."""
        return self._interval(self._replicates[task][model])

    def mean(self, model: str) -> Interval:
        """Return the interval of a model's mean score over tasks."""
        return self._interval(self._means(model))

    def share_of_experts(self, *models: str, expert: str = "expert") -> Interval:
        """Return that of `share_of_experts`; resamples in which the experts' mean is not above 0 are left out.

        Of several models (one method's, on several draws of calibration rows) it is the interval of all of their
        resamples together: what one of them, whichever it is, may show.

        Raises:
            DataError: there is no other resample.
        """
        experts = self._means(expert)
        usable = experts > 0
        shares = [_share_of_means(self._means(model)[usable], experts[usable]) for model in models]
        return self._interval(np.concatenate(shares))

    def difference(self, model: str, other: str, task: str | None = None) -> Interval:
        """Return the paired interval of score(model) - score(other), on one task or their mean."""
        if task is not None:
            return self._interval(self._replicates[task][model] - self._replicates[task][other])
        return self._interval(self._means(model) - self._means(other))

    def certainty(self, model: str, other: str, least: float = 0.0) -> float:
        """Return the share of resamples in which mean score(model) - mean score(other) is above `least`.

        A resample exactly there counts half, so that two models with the same answers are at 0.5.
        """
        gap = self._means(model) - self._means(other) - least
        return float(np.mean((gap > 0) + 0.5 * (gap == 0)))

    def _means(self, model: str) -> NDArray[np.float64]:
        stacked = np.stack([replicates[model] for replicates in self._replicates.values()])
        return np.asarray(stacked.mean(axis=0), dtype=np.float64)

    def _interval(self, replicates: NDArray[np.float64]) -> Interval:
        tail = (1 - self._confidence) / 2
        low, high = np.quantile(replicates, [tail, 1 - tail])
        return Interval(float(low), float(high))


def resampled_counts(rows: int, task: str, samples: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """Yield how often each row of a task comes in each resample, `(some, rows)`, until there were `samples`.

    The same resamples for every call with the same task, rows, samples and seed; each piece is of bounded memory.
    """
    generator = np.random.default_rng([seed, int(digest_text(task)[:16], 16)])
    chunk = max(1, _COUNTS_BYTES // (8 * rows))
    for start in range(0, samples, chunk):
        size = min(chunk, samples - start)
        yield generator.multinomial(rows, np.full(rows, 1 / rows), size=size).astype(np.float64)


def _resample(models: Mapping[str, Measured], task: str, samples: int, seed: int) -> dict[str, NDArray[np.float64]]:
    """Return the scores (samples,) of every model of one task over the same resamples of its rows."""
    pieces: dict[str, list[NDArray[np.float64]]] = {name: [] for name in models}
    for counts in resampled_counts(len(next(iter(models.values()))), task, samples, seed):
        # Model by model, so that no rounding of one depends on which others there are.
        for name, measured in models.items():
            pieces[name].append(np.asarray(measured.metric.score(counts @ measured.statistics), dtype=np.float64))
    return {name: np.concatenate(parts) for name, parts in pieces.items()}


def _share(model: NDArray[np.float64], expert: NDArray[np.float64]) -> float:
    return float(_share_of_means(np.mean(model), np.mean(expert)))


def _share_of_means(model: Any, expert: Any) -> Any:
    if np.size(expert) == 0 or not np.all(expert > 0):
        raise DataError(
            "the experts' mean score is not above 0, so that nothing can be a share of it; check their data and labels"
        )
    return model / expert


def _column(values: Mapping[str, float], tasks: Iterable[str]) -> NDArray[np.float64]:
    return np.array([values[task] for task in tasks], dtype=np.float64)


def _check(measured: Measurements) -> None:
    """Refuse anything that could not be resampled in pairs."""
    if not measured:
        raise BMMError("there is no task to summarise")
    for task, models in measured.items():
        shapes = {np.shape(one.statistics) for one in models.values()}
        if len(shapes) != 1 or len(next(iter(shapes))) != 2 or 0 in next(iter(shapes)):
            raise BMMError(f"the models of the task {task} were not run over the same rows: shapes {sorted(shapes)}")
        metrics = {one.metric.name for one in models.values()}
        if len(metrics) != 1:
            raise BMMError(f"the models of the task {task} were not measured alike: {', '.join(sorted(metrics))}")
        for name, one in models.items():
            if not np.isfinite(one.statistics).all():
                raise BMMError(f"the result of '{name}' on the task {task} is not finite")
