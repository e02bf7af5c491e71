"""The outer loop: propose, evaluate, log, until the trials are used up; then the best one.

How a setting is turned into a model and measured is the caller's `evaluate`; which setting comes next is
`bmm.search.propose`; how a trial is kept is `bmm.search.study`. Trial 0 is the anchor, so the result is
never worse than the anchor on what `evaluate` measures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bmm.errors import BMMError, UserError
from bmm.progress import progress
from bmm.search.propose import initial_design, propose, trial_seed
from bmm.search.recommend import recommended
from bmm.search.space import Setting, Space
from bmm.search.study import Study, Trial, best_of


@dataclass(frozen=True)
class Outcome:
    """What one evaluation found: the objective, to be maximised, and the metric of each task."""

    objective: float
    tasks: Mapping[str, float]


Evaluate = Callable[[Mapping[str, Setting]], Outcome]


def search(
    space: Space,
    evaluate: Evaluate,
    study: Study,
    trials: int,
    seed: int,
    noise: float | None = None,
    reference: float | None = None,
) -> Trial:
    """Run the study up to `trials` trials and return the one to publish (`bmm.search.recommend`).

    Trials that the study already holds are not evaluated again, nor are settings equal to those of an earlier trial:
    they take over its outcome. `noise` is the objective's variance, where it is known; `reference` is the `λ` that a
    walk through the network went on with. When `evaluate` raises a `BMMError` or a `FloatingPointError`, or finds a
    number that is not finite, the trial is logged as failed.

    Raises:
        UserError: as `evaluate` raised it; it is not a property of one setting.
        BMMError: the anchor itself could not be evaluated (nothing is logged, so the next run tries again),
            or the study's trials are of another space or seed.
    """
    if trials < 1:
        raise BMMError(f"a search needs at least one trial, the anchor, not {trials}")
    _check(space, study, seed)
    design = initial_design(space, trials, reference)
    best: Trial | None = None
    with progress("searching", trials) as bar:
        for index in range(trials):
            if index >= len(study.trials):
                if index < len(design):
                    origin, point, settings = design[index]
                else:
                    origin, point = propose(space, study.trials, seed, index, noise)
                    settings = space.decode(point)
                objective, tasks, reason = _outcome(evaluate, settings, study.trials)
                study.append(
                    Trial(
                        index=index,
                        origin=origin,
                        settings=settings,
                        objective=objective,
                        tasks=tasks,
                        point=point,
                        state="failed" if objective is None else "complete",
                        reason=reason,
                        seed=trial_seed(seed, index),
                    )
                )
            best = best_of(study.trials[: index + 1])
            if best is not None:
                bar.describe(f"searching, best {best.objective:.4f} at trial {best.index}")
            bar.advance()
    if best is None:
        raise BMMError(f"no trial of the study {study.path} is complete, not even the anchor")
    return recommended(study.trials[:trials], seed, noise, reference) or best


def _check(space: Space, study: Study, seed: int) -> None:
    """Refuse to go on from trials that this space and seed would not have proposed."""
    for trial in study.trials:
        if set(trial.settings) != set(space.groups) or trial.seed != trial_seed(seed, trial.index):
            raise BMMError(f"the study {study.path} was made with other module groups or another seed")


def _outcome(
    evaluate: Evaluate, settings: Mapping[str, Setting], earlier: tuple[Trial, ...]
) -> tuple[float | None, Mapping[str, float], str | None]:
    """Return objective, tasks and reason of failure, from an equal earlier trial if there is one."""
    for trial in earlier:
        if trial.settings == settings:
            return trial.objective, trial.tasks, trial.reason
    try:
        outcome = evaluate(settings)
    except UserError:
        raise
    except (BMMError, FloatingPointError) as error:
        if not earlier:
            raise BMMError(f"the anchor could not be evaluated: {error}") from error
        return None, {}, f"{type(error).__name__}: {error}"
    numbers = (outcome.objective, *outcome.tasks.values())
    if not all(math.isfinite(number) for number in numbers):
        if not earlier:
            raise BMMError("the anchor could not be evaluated: its objective or a task's metric is not finite")
        return None, {}, "the objective or a task's metric is not finite"
    return outcome.objective, outcome.tasks, None
