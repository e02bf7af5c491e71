"""Bayesian proposals: the maximiser of an acquisition function in a box, knowing what is under way.

One objective: expected improvement over noisy observations (qLogNEI, Ament et al., NeurIPS 2023), weighted by the
probability that every task keeps its floor. With the worst task beside it: expected hypervolume improvement (qLogNEHVI,
Daulton et al., NeurIPS 2021, in its logarithmic form) over what the anchor has of both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from bmm.search.model import (
    fitted,
    fitted_to_objective,
    inside,
    numerical_errors,
    outcomes_of,
    points_of,
    reproducible,
)
from bmm.search.plan import Plan
from bmm.search.region import TrustRegion, as_point
from bmm.search.space import Point, Space
from bmm.search.trial import Trial

_RESTARTS = 4
_RAW_SAMPLES = 128
_MONTE_CARLO_SAMPLES = 64
_ACQUISITION_ITERATIONS = 50
_LEAST_TRIALS = 3
_NOISE_SHARES = (1.0, 0.3, 0.1, 0.03)
"""What of the variance that rows tell may be noise between trials, which all answer the same rows.

Simulated on Gaussian processes fitted to 415 and 254 trials of real searches (texts, images; ten dimensions, 40 trials,
eight seeds): with the most probable share of these and a first trust region of 0.8, searches ended 0.2 points higher on
both than with the whole variance and 0.4. What is published is chosen with the whole (`bmm.search.recommend`).
"""


def bayesian(
    space: Space, history: Sequence[Trial], pending: Sequence[Point], region: TrustRegion, plan: Plan, seed: int
) -> Point | None:
    """Return the most promising point of `region`, or None where the numbers fail or there are too few trials.

    Args:
        space: what is searched.
        history: the trials that are finished.
        pending: the points that are under way.
        region: where to look.
        plan: noise, floors and objectives.
        seed: of this proposal.
    """
    import torch

    trials = inside(space, history)
    if sum(trial.objective is not None for trial in trials) < _LEAST_TRIALS:
        return None
    bounds = torch.tensor([region.lower, region.upper], dtype=torch.float64)
    try:
        with reproducible(seed):
            candidate = _maximiser(trials, history, pending, bounds, plan, seed)
    except numerical_errors():
        return None
    if not torch.isfinite(candidate).all():
        return None
    return as_point(candidate.clamp(bounds[0], bounds[1]).tolist())


def _maximiser(
    trials: Sequence[Trial], history: Sequence[Trial], pending: Sequence[Point], bounds: Any, plan: Plan, seed: int
) -> Any:
    """Return the maximiser `(d,)` of the acquisition function in `bounds` `(2, d)`."""
    import torch
    from botorch.optim import optimize_acqf
    from botorch.sampling.normal import SobolQMCNormalSampler

    points = points_of(trials)
    sampler = SobolQMCNormalSampler(torch.Size([_MONTE_CARLO_SAMPLES]), seed=seed)
    waiting = torch.tensor(list(pending), dtype=torch.float64) if pending else None
    if plan.worst_task:
        acquisition = _two_objectives(trials, history, points, sampler, waiting, plan)
    else:
        acquisition = _one_objective(trials, points, sampler, waiting, plan)
    candidates, _ = optimize_acqf(
        acquisition,
        bounds=bounds,
        q=1,
        num_restarts=_RESTARTS,
        raw_samples=_RAW_SAMPLES,
        options={"batch_limit": _RESTARTS, "maxiter": _ACQUISITION_ITERATIONS, "seed": seed},
    )
    return candidates.detach().squeeze(0)


def _one_objective(trials: Sequence[Trial], points: Any, sampler: Any, waiting: Any, plan: Plan) -> Any:
    from botorch.acquisition.logei import qLogNoisyExpectedImprovement
    from botorch.acquisition.objective import GenericMCObjective

    objective = fitted_to_objective(trials, plan.noise, sparse=plan.searcher == "saas", shares=_NOISE_SHARES)
    if not plan.floors:
        return qLogNoisyExpectedImprovement(
            model=objective, X_baseline=points, sampler=sampler, X_pending=waiting, prune_baseline=True
        )
    return qLogNoisyExpectedImprovement(
        model=_several([objective, *_of_floors(trials, points, plan)]),
        X_baseline=points,
        sampler=sampler,
        objective=GenericMCObjective(_first),
        constraints=_constraints(plan, 1),
        X_pending=waiting,
        prune_baseline=True,
    )


def _two_objectives(
    trials: Sequence[Trial], history: Sequence[Trial], points: Any, sampler: Any, waiting: Any, plan: Plan
) -> Any:
    import torch
    from botorch.acquisition.multi_objective import logei
    from botorch.acquisition.multi_objective.objective import IdentityMCMultiOutputObjective

    # Else BoTorch compiles C++ for this very processor, where it finds a compiler: for half a minute, into the user's
    # home, and to other digits than on the next machine.
    logei._load_attempted = True
    worst = fitted(points, outcomes_of(trials, plan.worst))
    anchor = history[0]
    reference = [float(anchor.objective or 0.0), plan.worst(anchor)]
    return logei.qLogNoisyExpectedHypervolumeImprovement(
        model=_several(
            [
                fitted_to_objective(trials, plan.noise, shares=_NOISE_SHARES),
                worst,
                *_of_floors(trials, points, plan),
            ]
        ),
        ref_point=torch.tensor(reference, dtype=torch.float64),
        X_baseline=points,
        sampler=sampler,
        objective=IdentityMCMultiOutputObjective(outcomes=[0, 1]),
        constraints=_constraints(plan, 2) or None,
        X_pending=waiting,
        prune_baseline=True,
    )


def _of_floors(trials: Sequence[Trial], points: Any, plan: Plan) -> list[Any]:
    return [fitted(points, outcomes_of(trials, partial(_share, task=task, plan=plan))) for task in plan.floors]


def _share(trial: Trial, *, task: str, plan: Plan) -> float:
    return plan.shares(trial)[task]


def _constraints(plan: Plan, first: int) -> list[Callable[[Any], Any]]:
    """Return what is negative where a task keeps its floor, of samples whose last axis is the outcomes."""
    return [partial(_below, place=place, floor=floor) for place, floor in enumerate(plan.floors.values(), first)]


def _below(samples: Any, *, place: int, floor: float) -> Any:
    return floor - samples[..., place]


def _first(samples: Any, X: Any = None) -> Any:  # noqa: ARG001 - named by BoTorch
    return samples[..., 0]


def _several(models: Sequence[Any]) -> Any:
    from botorch.models import ModelListGP

    return ModelListGP(*models)
