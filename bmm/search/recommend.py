"""Which trial of a finished study is published: the best after smoothing, and the walk's own if it is about as good.

The best of many noisy measurements is best partly by luck: a few hundred validation rows move by more than what
separates good settings. So the trials are smoothed by the Gaussian process that proposed them, with the noise that the
rows have, and the highest posterior mean is taken, as is usual in noisy Bayesian optimisation (Frazier, arXiv
1807.02811, section 5). A walk through the network is exact at the `λ` that it went on with: at another one a layer is
solved from inputs that the layers before it no longer give. So, unless every trial walks, that setting is taken unless
it is worse by more than one standard error (Hastie, Tibshirani and Friedman, The Elements of Statistical Learning,
7.10) of the difference on the same rows (`bmm.search.rows`). Elsewhere none is preferred: on four text tasks with TSV-M
the anchor stood within one standard error of the best and kept 94.8 % on the test rows, the best 96.7 %. Only trials
that measured no worse than the anchor, by the objective and, where that is another, by the tasks' metric, stand for
election, so the published model is never below its anchor on the validation rows; where tasks have floors, those that
keep them, or else those that miss them by least, and of these again only such as are no worse than the anchor, if it is
one of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from bmm.search.model import (
    fitted_to_objective,
    inside,
    numerical_errors,
    points_of,
    reproducible,
)
from bmm.search.plan import Plan, trial_seed
from bmm.search.rows import variance_of_difference
from bmm.search.space import Space
from bmm.search.trial import Trial, best_of


def recommended(space: Space, trials: Sequence[Trial], plan: Plan) -> Trial | None:
    """Return the trial to publish, or None where none is complete.

    Args:
        space: what was searched.
        trials: all of a study, the anchor first.
        plan: the search's; where the noise of the rows is not known, the luckiest trial is taken.
    """
    elected = _electable(trials, plan)
    best = best_of(elected)
    if best is None or _error(best, best, plan) is None or sum(trial.objective is not None for trial in trials) < 3:
        return best
    means = _smoothed(space, trials, plan)
    if means is None:
        return best
    # What lies outside of the cube (the anchor, sometimes) stands as it was measured.
    worth = {trial.index: means.get(trial.index, trial.objective or 0.0) for trial in elected}
    top = max(elected, key=lambda trial: (worth[trial.index], -trial.index))
    own = next((trial for trial in elected if _is_of_walk(space, trial, plan)), None)
    if own is not None and worth[own.index] >= worth[top.index] - (_error(top, own, plan) or 0.0):
        return own
    return top


def pareto_front(trials: Sequence[Trial], plan: Plan) -> list[Trial]:
    """Return the complete trials that no other one beats in the objective and the worst task alike, best first."""
    complete = [trial for trial in trials if trial.state == "complete"]
    found: list[Trial] = []
    highest = -math.inf
    for trial in sorted(complete, key=lambda trial: (-float(trial.objective or 0.0), -plan.worst(trial), trial.index)):
        if plan.worst(trial) > highest:
            found.append(trial)
            highest = plan.worst(trial)
    return found


def _electable(trials: Sequence[Trial], plan: Plan) -> list[Trial]:
    complete = [trial for trial in trials if trial.state == "complete" and trial.objective is not None]
    if not complete:
        return []
    anchor = complete[0]
    floor = float(anchor.objective or 0.0)
    elected = [trial for trial in complete if float(trial.objective or 0.0) >= floor and plan.harmless(trial, anchor)]
    if not plan.floors:
        return elected
    # A task's floor comes before the mean: the anchor may be one that sacrifices it.
    least = min(plan.shortfall(trial) for trial in complete)
    nearest = [trial for trial in complete if plan.shortfall(trial) <= least]
    return [trial for trial in nearest if trial in elected] if anchor in nearest else nearest


def _error(one: Trial, other: Trial, plan: Plan) -> float | None:
    """Return the standard error of two trials' difference, where they have no rows that of a trial; None if unknown."""
    if one.gains is not None and other.gains is not None:
        return math.sqrt(variance_of_difference(one.gains, other.gains))
    noise = one.variance if plan.noise is None else plan.noise
    return None if noise is None else math.sqrt(noise)


def _is_of_walk(space: Space, trial: Trial, plan: Plan) -> bool:
    return plan.preferred and plan.reference is not None and trial.settings == space.plain(plan.reference)


def _smoothed(space: Space, trials: Sequence[Trial], plan: Plan) -> dict[int, float] | None:
    """Return the posterior mean at each trial by its index, to 9 digits, or None where the numbers fail."""
    import torch

    known = inside(space, [trial for trial in trials if trial.objective is not None])
    if len(known) < 2:
        return None
    if len({trial.objective for trial in known}) == 1:
        return None
    try:
        with reproducible(trial_seed(plan.seed, 0, "recommend")), torch.no_grad():
            with torch.enable_grad():
                model = fitted_to_objective(known, plan.noise)
            means = model.posterior(points_of(known)).mean.squeeze(-1)
    except numerical_errors():
        return None
    if not bool(torch.isfinite(means).all()):
        return None
    return {trial.index: round(value, 9) for trial, value in zip(known, means.tolist(), strict=True)}
