"""From a solved merge to models drawn from its posterior: the noise of every map, and one draw's weights.

The mathematics of one map is `bmm.regression.sample`; which settings were chosen, and what the drawn models are worth,
is `bmm.stages.sample`. Maps are drawn independently of each other: the posterior of a layer takes the layers before it
as they are in the mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from bmm.assembly import Assembler
from bmm.problems import GramOf, Problem
from bmm.regression.moments import Moments
from bmm.regression.sample import (
    deviation,
    effective_rows,
    error_from_experts,
    error_from_moments,
    noise_variance,
    settled_directions,
    spread_squared,
    standard_normal,
)
from bmm.search.setting import Setting
from bmm.weights import ExpertWeights

Settings = Mapping[str, Setting]


@dataclass(frozen=True)
class Noise:
    """What decides the width of one map's posterior.

    `variance` is `1/β` `(out,)` float64, `rows` the `n` rows that each task weighs, `settled` the number of directions
    that the data has settled, and `relative` the root mean square of a draw's deviation over the norm of `Ŵ − W_0`
    (None where that is zero).
    """

    variance: torch.Tensor
    rows: float
    settled: float
    relative: float | None


class Sampler:
    """Draws from the posterior of a whole merge.

    Args:
        assembler: the merge's regressed maps.
        settings: by module.
        noise: by module; a map without any is not drawn and stays at its mean.
    """

    def __init__(self, assembler: Assembler, settings: Settings, noise: Mapping[str, Noise]) -> None:
        self._assembler = assembler
        self._settings = settings
        self._noise = noise

    def weights(self, seed: int, index: int) -> dict[str, torch.Tensor]:
        """Return every regressed parameter of one draw by canonical name, float32.

        A draw `W` is published as the mean is: `W_0 + γ (W − W_0)`.
        """

        def spread(problem: Problem, lam: float) -> torch.Tensor:
            module = problem.map.module
            noise = self._noise.get(module)
            if noise is None:
                return torch.zeros_like(problem.posterior.anchor)
            normal = standard_normal(seed, index, module, problem.posterior.anchor.shape)
            return deviation(problem.posterior, lam, noise.variance, noise.rows, normal)

        return self._assembler.weights(self._settings, spread)


def module_wise_noise(
    assembler: Assembler,
    settings: Settings,
    weights: ExpertWeights,
    gram: GramOf,
    rows: Callable[[int, str], int],
) -> dict[str, Noise]:
    """Return the noise of maps that were regressed on the inputs that each expert sees.

    Args:
        assembler: the maps.
        settings: by module.
        weights: the experts.
        gram: gives expert `t`'s Gram matrix `(in, in)` by (t, input group, how it is to be summed).
        rows: gives the number of rows behind it.
    """
    found = {}
    for group, problems in _by_group(assembler, settings).items():
        counts = [rows(index, group) for index in range(weights.count)]
        # The residuals are weighed as the regression has weighed them.
        summed = {settings[problem.map.module].sums for problem in problems}
        grams = {sums: [gram(index, group, sums) for index in range(weights.count)] for sums in summed}
        for problem in problems:
            setting = settings[problem.map.module]
            experts = (problem.map.matrix(partial(weights.expert, index), bias=False) for index in range(weights.count))
            error = error_from_experts(problem.posterior.mean(setting.lam), experts, grams[setting.sums])
            found[problem.map.module] = _noise(problem, setting.lam, error, counts)
    return _drawn(found)


def propagated_noise(assembler: Assembler, settings: Settings, moments: Callable[[str], Moments]) -> dict[str, Noise]:
    """Return the noise of maps that were regressed on what the merged model itself reads.

    Args:
        assembler: the maps.
        settings: by module.
        moments: gives the moments by input group.
    """
    found = {}
    for group, problems in _by_group(assembler, settings).items():
        held = moments(group)
        for problem in problems:
            module = problem.map.module
            lam = settings[module].lam
            error = error_from_moments(problem.posterior.mean(lam), held.gram, held.cross[module], held.power[module])
            found[module] = _noise(problem, lam, error, held.rows)
    return _drawn(found)


def _noise(problem: Problem, lam: float, error: torch.Tensor, counts: Sequence[int]) -> Noise | None:
    """Return one map's noise; None where there is nothing to draw."""
    posterior = problem.posterior
    # A task of which no row came here (an expert of a mixture that none of its tokens were sent to) says nothing.
    seen = [count for count in counts if count]
    if math.isinf(lam) or posterior.spectrum.trace == 0 or not seen:
        return None
    rows = effective_rows(seen)
    variance = noise_variance(posterior, lam, error, rows, len(seen))
    moved = float((posterior.mean(lam) - problem.base.to(torch.float64)).norm())
    relative = math.sqrt(spread_squared(posterior, lam, variance, rows)) / moved if moved else None
    return Noise(variance, rows, settled_directions(posterior, lam), relative)


def _drawn(found: Mapping[str, Noise | None]) -> dict[str, Noise]:
    return {module: noise for module, noise in found.items() if noise is not None}


def _by_group(assembler: Assembler, settings: Settings) -> dict[str, list[Problem]]:
    """Return the problems as they were solved at their settings, by what they read."""
    groups: dict[str, list[Problem]] = {}
    for module in assembler.problems:
        problem = assembler.problem(module, settings[module])
        groups.setdefault(problem.map.input_group, []).append(problem)
    return groups
