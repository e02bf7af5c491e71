"""Which trial of a finished study is published: the one that the model of all trials thinks best, not the luckiest.

The best of many noisy measurements is best partly by luck: a few hundred validation rows move by more than what
separates good settings. So the trials are smoothed by the Gaussian process that proposed them, with the noise that the
rows have, and the trial with the highest posterior mean is taken, the usual choice in noisy Bayesian optimisation
(Frazier, arXiv 1807.02811, section 5). Only trials that measured no worse than the anchor stand for election, so the
published model is never below its anchor on the validation rows.
"""

from __future__ import annotations

from collections.abc import Sequence

from bmm.search.propose import fitted, reproducible, trial_seed
from bmm.search.study import Trial, best_of


def recommended(trials: Sequence[Trial], seed: int, noise: float | None) -> Trial | None:
    """Return the trial to publish, or None where none is complete.

    Args:
        trials: all of a study, the anchor first.
        seed: the search's.
        noise: the objective's variance; without it the luckiest trial is taken.
    """
    best = best_of(tuple(trials))
    complete = [trial for trial in trials if trial.objective is not None]
    if best is None or noise is None or len(complete) < 3:
        return best
    floor = complete[0].objective
    elected = [place for place, trial in enumerate(complete) if _at_least(trial, floor)]
    means = _smoothed(complete, trial_seed(seed, 0, "recommend"), noise)
    return best if means is None else complete[max(elected, key=lambda place: (means[place], -place))]


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
