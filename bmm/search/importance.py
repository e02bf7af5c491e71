"""Which hyperparameters mattered: how much of the model's ups and downs each of them accounts for.

Of the Gaussian process fitted to a finished study, the total-order Sobol index of every axis over the whole cube
(Jansen 1999, doi 10.1016/S0010-4655(98)00154-4): the share of the variance of its mean that goes when the axis is held.
Shares of axes that act together count for each of them, so that they may add up to more than one. Beside it the axis's
length scale, in the unit cube.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bmm.search.model import (
    fitted_to_objective,
    inside,
    numerical_errors,
    reproducible,
)
from bmm.search.plan import Plan, trial_seed
from bmm.search.rivals import sobol_points
from bmm.search.space import Space
from bmm.search.trial import Trial

_SAMPLES = 256
_LEAST_TRIALS = 6
_FLAT = 1e-12


def importance(space: Space, trials: Sequence[Trial], plan: Plan) -> list[dict[str, Any]]:
    """Return what is known of each axis, the most important first; nothing where the trials tell nothing.

    Returns:
        For each axis its `name`, `hyperparameter`, `groups`, `task`, `share` (0 to 1) and `length_scale`.
    """
    import torch

    known = inside(space, [trial for trial in trials if trial.objective is not None])
    if len(known) < _LEAST_TRIALS:
        return []
    if len({trial.objective for trial in known}) == 1:
        return []
    seed = trial_seed(plan.seed, 0, "importance")
    try:
        with reproducible(seed):
            model = fitted_to_objective(known, plan.noise)
            with torch.no_grad():
                shares = _total_order(model, space.dimensions, seed)
                scales = _length_scales(model, space.dimensions)
    except numerical_errors():
        return []
    if shares is None:
        return []
    found = [
        {
            "name": axis.name,
            "hyperparameter": axis.key,
            "groups": list(axis.groups),
            "task": axis.task,
            "share": round(share, 6),
            "length_scale": round(scale, 6),
        }
        for axis, share, scale in zip(space.axes, shares, scales, strict=True)
    ]
    return sorted(found, key=lambda entry: -float(entry["share"]))


def _total_order(model: Any, dimensions: int, seed: int) -> list[float] | None:
    import torch

    draws = torch.tensor(sobol_points(2 * dimensions, seed, 0, _SAMPLES), dtype=torch.float64)
    first, second = draws[:, :dimensions], draws[:, dimensions:]
    at_first = model.posterior(first).mean.squeeze(-1)
    variance = float(at_first.var())
    if not variance > _FLAT:
        return None
    shares = []
    for axis in range(dimensions):
        mixed = first.clone()
        mixed[:, axis] = second[:, axis]
        apart = at_first - model.posterior(mixed).mean.squeeze(-1)
        shares.append(min(1.0, float(apart.square().mean()) / (2 * variance)))
    return shares


def _length_scales(model: Any, dimensions: int) -> list[float]:
    kernel = model.covar_module
    kernel = getattr(kernel, "base_kernel", kernel)
    scales: list[float] = kernel.lengthscale.reshape(-1).expand(dimensions).tolist()
    return scales
