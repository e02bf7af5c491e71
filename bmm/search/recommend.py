"""Which trial of a finished study is published: the simplest that is not clearly worse than the best.

The best of many noisy measurements is best partly by luck: a few hundred validation rows move by more than what
separates good settings. So the trials are smoothed by the Gaussian process that proposed them, with the noise that the
rows have, as is usual in noisy Bayesian optimisation (Frazier, arXiv 1807.02811, section 5); and of those within one
standard error of the highest, one of the plain ones is taken if there is any: one `λ` for all groups and `γ = 1`
(the one-standard-error rule: Hastie, Tibshirani and Friedman, The Elements of Statistical Learning, 7.10). Only trials
that measured no worse than the anchor stand for election, so the published model is never below its anchor on the
validation rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from bmm.search.propose import fitted, reproducible, trial_seed
from bmm.search.study import Trial, best_of


def recommended(
    trials: Sequence[Trial], seed: int, noise: float | None, reference: float | None = None
) -> Trial | None:
    """Return the trial to publish, or None where none is complete.

    Args:
        trials: all of a study, the anchor first.
        seed: the search's.
        noise: the objective's variance; without it the luckiest trial is taken.
        reference: the `λ` that a walk through the network went on with. At another one a layer is solved from inputs
            that the layers before it no longer give, so of the plain settings this one is preferred.
    """
    best = best_of(tuple(trials))
    complete = [trial for trial in trials if trial.objective is not None]
    if best is None or noise is None or len(complete) < 3:
        return best
    floor = complete[0].objective
    elected = [place for place, trial in enumerate(complete) if _at_least(trial, floor)]
    means = _smoothed(complete, trial_seed(seed, 0, "recommend"), noise)
    if means is None:
        return best
    highest = max(means[place] for place in elected)
    plain = [place for place in elected if complete[place].origin in ("anchor", "global")]
    near = [place for place in plain if means[place] >= highest - math.sqrt(noise)]
    own = [place for place in near if _is_all(complete[place], reference)]
    return complete[max(own or near or elected, key=lambda place: (means[place], -place))]


def _is_all(trial: Trial, reference: float | None) -> bool:
    """Say whether every group has this `λ`, and `γ = 1`."""
    return all(
        reference is not None and math.isclose(setting.lam, reference, rel_tol=1e-9) and setting.gamma == 1
        for setting in trial.settings.values()
    )


def _at_least(trial: Trial, floor: float | None) -> bool:
    return trial.objective is not None and floor is not None and trial.objective >= floor


def _smoothed(trials: Sequence[Trial], seed: int, noise: float) -> list[float] | None:
    """Return the posterior mean at each trial, to 9 digits, or None where the numbers fail."""
    import torch
    from botorch.exceptions import BotorchError, ModelFittingError

    points = torch.tensor([trial.point for trial in trials], dtype=torch.float64)
    outcomes = torch.tensor([trial.objective for trial in trials], dtype=torch.float64).unsqueeze(-1)
    if float(outcomes.max() - outcomes.min()) == 0:
        return None
    try:
        with reproducible(seed), torch.no_grad():
            with torch.enable_grad():
                model = fitted(points, outcomes, noise)
            means = model.posterior(points).mean.squeeze(-1)
    except (BotorchError, ModelFittingError, ArithmeticError, RuntimeError, ValueError):
        return None
    return None if not bool(torch.isfinite(means).all()) else [round(value, 9) for value in means.tolist()]
