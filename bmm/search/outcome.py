"""What one evaluation finds, and what of it goes into the log."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace

from bmm.errors import ArtefactDamagedError, BMMError, ClusterError, KilledWorkersError, StoreAwayError, UserError
from bmm.search.rows import GainsByTask
from bmm.search.setting import Setting
from bmm.search.trial import State, Trial

_OF_THE_MACHINE = (ClusterError, StoreAwayError, ArtefactDamagedError)
"""No property of a setting: the next run tries it again."""


@dataclass(frozen=True)
class Outcome:
    """What one evaluation found.

    Attributes:
        objective: to be maximised; of a trial that was stopped what it was heading for.
        tasks: the metric of each task.
        variance: of the objective over draws of the rows.
        seen: the share of the rows that were seen; below 1 the trial was stopped.
        gains: of each row, where the objective is a mean over rows.
    """

    objective: float
    tasks: Mapping[str, float]
    variance: float | None = None
    seen: float = 1.0
    gains: GainsByTask | None = None


Evaluate = Callable[[Mapping[str, Setting], GainsByTask | None], Outcome]
"""Measures settings by group; given the rows of the best trial so far, it may stop when these cannot be beaten."""


def as_trial(future: Future[Outcome], bare: Trial) -> Trial:
    """Return a trial with what was found for it, or with why nothing was.

    Raises:
        UserError, ClusterError, StoreAwayError, ArtefactDamagedError: as the evaluation raised it, unless it is that
            the trial killed every worker.
        BMMError: the anchor, trial 0, could not be evaluated.
    """
    try:
        outcome = future.result()
    except (BMMError, FloatingPointError) as error:
        if isinstance(error, UserError) or _is_of_the_machine(error):
            raise
        if bare.index == 0:
            raise BMMError(f"the anchor could not be evaluated: {error}") from error
        return replace(bare, reason=f"{type(error).__name__}: {error}")
    if not all(math.isfinite(number) for number in (outcome.objective, *outcome.tasks.values())):
        if bare.index == 0:
            raise BMMError("the anchor could not be evaluated: its objective or a task's metric is not finite")
        return replace(bare, reason="the objective or a task's metric is not finite")
    state: State = "complete" if outcome.seen == 1 else "stopped"
    return replace(
        bare,
        objective=outcome.objective,
        tasks=outcome.tasks,
        state=state,
        variance=outcome.variance,
        seen=outcome.seen,
        gains=outcome.gains,
    )


def _is_of_the_machine(error: Exception) -> bool:
    return isinstance(error, _OF_THE_MACHINE) and not isinstance(error, KilledWorkersError)
