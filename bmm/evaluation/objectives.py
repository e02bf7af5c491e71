"""What a search may maximise, row by row: the share of the expert's metric, likelihood, agreement with the expert.

An objective is a mean over tasks of a mean over rows of gains, wherever its metric is a mean over rows: so two models
can be compared in pairs on the rows seen so far (`bmm.evaluation.racing`). Lives here: gains from answers. Does not
live here: running models (`bmm.prediction`) and searching (`bmm.search`).

* `share-of-expert`: the metric over the expert's.
* `nll`: `log p(label)` in nats, whose mean is the negated negative log-likelihood; it moves with every change of the
  weights, where an accuracy moves in steps of one over the rows.
* `agreement`: `−KL(p_expert ‖ p_merged) = −Σ p_expert (log p_expert − log p_merged)` in nats; it asks for no label, and
  is 0 where the merged model answers just as the expert does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from bmm.errors import BMMError
from bmm.evaluation.calibration import log_softmax
from bmm.evaluation.metrics import Measured, mean_ratio_to_expert
from bmm.evaluation.scores import ACCURACY, share_score

RowGains = NDArray[np.float64]
"""What each row of one task adds to the task's part of the objective, (rows,)."""


@dataclass(frozen=True)
class Reference:
    """What a task's answers are compared with.

    Attributes:
        score: the expert's metric.
        answers: the expert's logits `(rows, classes)`; needed for `agreement` alone.
        labels: class ids; None where rows have none.
    """

    score: float
    answers: torch.Tensor | None = None
    labels: Sequence[int] | None = None


def gains(objective: str, answers: torch.Tensor, measured: Measured, reference: Reference) -> RowGains | None:
    """Return what each row adds to a task's part of the objective, (rows,); None where that is no mean over rows.

    Args:
        objective: the recipe's word.
        answers: the model's, `(rows, classes)` where the task has classes.
        measured: what they are worth by the task's metric.
        reference: the expert's, of the same rows.
    """
    if objective == "share-of-expert":
        counted = measured.statistics
        if measured.metric.score is not share_score or not np.array_equal(counted[:, 1], np.ones(len(counted))):
            return None
        return np.asarray(counted[:, 0] / reference.score, dtype=np.float64)
    own = log_softmax(answers.numpy())
    if objective == "nll":
        if reference.labels is None:
            raise BMMError("the likelihood of labels was asked for of rows that have none")
        return np.asarray(own[np.arange(len(own)), list(reference.labels)], dtype=np.float64)
    if reference.answers is None:
        raise BMMError("agreement was asked for without the expert's answers")
    expert = log_softmax(reference.answers.numpy())
    return np.asarray(-(np.exp(expert) * (expert - own)).sum(axis=1), dtype=np.float64)


def same_answers(answers: torch.Tensor, expert: torch.Tensor) -> Measured:
    """Return the share of rows whose first choice is the expert's: the metric of rows without labels."""
    return Measured(ACCURACY, ACCURACY.statistics(answers.numpy(), expert.argmax(dim=1).tolist()))


def value_of(
    objective: str,
    measured: Mapping[str, Measured],
    found: Mapping[str, RowGains | None],
    references: Mapping[str, Reference],
) -> tuple[float, float]:
    """Return the objective and its variance over draws of the rows.

    Args:
        objective: the recipe's word.
        measured: the metric's statistics by task.
        found: the rows' gains by task.
        references: the experts'.
    """
    count = len(measured)
    if objective == "share-of-expert":
        # As the table's shares are made, whatever the metric.
        scores = {task: one.score for task, one in measured.items()}
        value = mean_ratio_to_expert(scores, {task: reference.score for task, reference in references.items()})
        variances = [one.variance / references[task].score ** 2 for task, one in measured.items()]
        return value, sum(variances) / count**2
    rows = [one for one in found.values() if one is not None]
    return float(np.mean([one.mean() for one in rows])), sum(mean_variance(one) for one in rows) / count**2


def mean_variance(rows: RowGains) -> float:
    """Return the variance of the rows' mean over draws of the rows; 0 for a single row."""
    return float(rows.var(ddof=1) / len(rows)) if len(rows) > 1 else 0.0
