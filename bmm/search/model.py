"""The Gaussian processes of a search: what is fitted to the trials so far, in double precision, reproducibly.

What is done with them is elsewhere: proposing (`bmm.search.bayesian`), choosing what is published
(`bmm.search.recommend`), telling which hyperparameters matter (`bmm.search.importance`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from math import isfinite
from typing import Any

from bmm.search.rows import variances
from bmm.search.space import Space
from bmm.search.trial import Trial
from bmm.threads import one_thread

_FIT_ITERATIONS = 50
# Of the likelihood: four strengths of the sparse prior cost four fits.
_SPARSE_PRIORS = 4
# A hundredth of a point of a share of one: less than any set of validation rows can tell.
_LEAST_VARIANCE = 1e-8


def inside(space: Space, trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials whose settings are those of their points: not an anchor that lies outside of the cube."""
    return [trial for trial in trials if space.decode(trial.point) == trial.settings]


def points_of(trials: Sequence[Trial]) -> Any:
    """Return the points `(n, d)`, float64."""
    import torch

    return torch.tensor([trial.point for trial in trials], dtype=torch.float64)


def outcomes_of(trials: Sequence[Trial], value: Callable[[Trial], float]) -> Any:
    """Return a value of each trial `(n, 1)`, float64; that of a failed trial is the worst of the others.

    So the model learns to stay away from what fails.
    """
    import torch

    known = {trial.index: value(trial) for trial in trials if trial.objective is not None}
    worst = min(known.values())
    values = [known.get(trial.index, worst) for trial in trials]
    return torch.tensor(values, dtype=torch.float64).unsqueeze(-1)


def variances_of(trials: Sequence[Trial], noise: float | None) -> Any:
    """Return the variance of each trial's objective `(n, 1)`, float64; None where one is not known: to be inferred.

    Where trials have rows it is what they do not share (`bmm.search.rows`), else that over draws of the rows.
    """
    import torch

    values = [noise if trial.variance is None else trial.variance for trial in trials]
    with_rows = [place for place, trial in enumerate(trials) if trial.gains is not None]
    own = variances([gains for trial in trials if (gains := trial.gains) is not None])
    for place, variance in zip(with_rows, own or (), strict=False):
        values[place] = variance
    # A failed trial has none, and stands for what is as bad as the worst.
    known = [value for value in values if value is not None]
    if len(known) < sum(trial.objective is not None for trial in trials):
        return None
    values = [max(max(known) if value is None else value, _LEAST_VARIANCE) for value in values]
    return torch.tensor(values, dtype=torch.float64).unsqueeze(-1)


def fitted(points: Any, outcomes: Any, variances: Any = None, *, sparse: bool = False) -> Any:
    """Return the Gaussian process fitted to outcomes `(n, 1)` at points `(n, d)`, double precision.

    Args:
        points: in the unit cube.
        outcomes: what was found there.
        variances: of their noise `(n, 1)`; without them one is inferred.
        sparse: under the SAAS prior (Eriksson and Jankowiak, UAI 2021), by which most axes do not matter, at its most
            probable hyperparameters, for several strengths at once.
    """
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from botorch.models.map_saas import EnsembleMapSaasSingleTaskGP
    from botorch.models.transforms.outcome import Standardize
    from gpytorch.mlls import ExactMarginalLogLikelihood

    if sparse:
        # It standardises outcomes itself, for each strength.
        model = EnsembleMapSaasSingleTaskGP(points, outcomes, train_Yvar=variances, num_taus=_SPARSE_PRIORS)
    else:
        model = SingleTaskGP(points, outcomes, train_Yvar=variances, outcome_transform=Standardize(m=1))
    fit_gpytorch_mll(
        ExactMarginalLogLikelihood(model.likelihood, model),
        optimizer_kwargs={"options": {"maxiter": _FIT_ITERATIONS}},
    )
    return model


def fitted_to_objective(
    trials: Sequence[Trial], noise: float | None, *, sparse: bool = False, shares: Sequence[float] = (1.0,)
) -> Any:
    """Return the Gaussian process fitted to the trials' objectives, with the noise of their rows; see `fitted`.

    Args:
        trials: of a study.
        noise: the variance of an objective whose rows are not known, None where it is to be inferred.
        sparse: see `fitted`.
        shares: how much of what the rows tell may be noise (`bmm.search.rows`); of several the one is taken under which
            the objectives are most probable.
    """
    points, variances = points_of(trials), variances_of(trials, noise)
    outcomes = outcomes_of(trials, lambda trial: float(trial.objective or 0.0))
    if variances is None or sparse or len(shares) == 1:
        scaled = None if variances is None else (1.0 if sparse else shares[0]) * variances
        return fitted(points, outcomes, scaled, sparse=sparse)
    found: list[tuple[float, Any]] = []
    for share in shares:
        # Another share may do where the numbers fail under this one.
        with suppress(*numerical_errors()):
            model = fitted(points, outcomes, share * variances)
            evidence = _log_evidence(model)
            if isfinite(evidence):
                found.append((evidence, model))
    if not found:
        raise ArithmeticError("no share of the rows' variance gives a Gaussian process whose evidence is a number")
    return max(found, key=lambda one: one[0])[1]


def _log_evidence(model: Any) -> float:
    """Return the logarithm of a fitted process's marginal likelihood, with its hyperparameters' priors, over rows."""
    from gpytorch.mlls import ExactMarginalLogLikelihood

    model.train()
    found = float(ExactMarginalLogLikelihood(model.likelihood, model)(model(*model.train_inputs), model.train_targets))
    model.eval()
    return found


def numerical_errors() -> tuple[type[Exception], ...]:
    """Return what numbers raise that fail: a covariance that is not positive definite, a NaN within one, no fit."""
    from botorch.exceptions import BotorchError, ModelFittingError

    return (BotorchError, ModelFittingError, ArithmeticError, RuntimeError, ValueError)


@contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """Seed torch and hold it to one thread inside the block, and put both back: sums then have one order."""
    import torch

    with torch.random.fork_rng(devices=[]), one_thread(), warnings.catch_warnings():
        # What BoTorch warns of (inputs, convergence, jitter) is either handled here or of no use to a caller.
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        yield
