"""From hyperparameters to weights: the posterior of every linear map, ready for any `λ` and `γ`.

Built once a search, from the experts' Gram matrices (`module_wise`) or from the moments of a walk through the network
(`propagated`), by one eigendecomposition per distinct input; after that, a new setting costs one matrix product a map.
The mathematics of one map is `bmm.regression.posterior`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from bmm.modules.linear import LinearMap
from bmm.progress import progress
from bmm.regression.posterior import Posterior, assemble, decompose, factor, residual
from bmm.regression.propagate import Moments
from bmm.search.space import Setting
from bmm.weights import ExpertWeights

GramOf = Callable[[int, str], torch.Tensor]
TensorOf = Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class Solved:
    """One map's published parameters by canonical name, float32, and the condition number behind them."""

    tensors: Mapping[str, torch.Tensor]
    condition: float | None


@dataclass(frozen=True)
class Problem:
    """One map to be solved: its posterior around the anchor, and the base that `γ` scales from.

    Both are `(out, in)`, or `(out, in + 1)` where the bias, the last column, is solved too.
    """

    map: LinearMap
    posterior: Posterior
    base: torch.Tensor


class Assembler:
    """The regressed maps of one merge."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self._problems = {problem.map.module: problem for problem in problems}

    @property
    def parameters(self) -> dict[str, str]:
        """Canonical name of every regressed parameter, with its module."""
        return {
            name: module
            for module, problem in self._problems.items()
            for name in problem.map.parameters
            if problem.base.shape[1] > problem.map.inputs or name == problem.map.weight
        }

    def solve(self, module: str, setting: Setting) -> Solved:
        """Return one map's parameters at one setting.

        `λ = ∞` with `γ = 1` gives the anchor's own, bit for bit.

        Raises:
            FloatingPointError: a parameter is not finite.
        """
        problem = self._problems[module]
        mean = problem.posterior.mean(setting.lam)
        solution = (mean if setting.gamma == 1.0 else assemble(problem.base, mean, setting.gamma)).to(torch.float32)
        if not bool(torch.isfinite(solution).all()):
            raise FloatingPointError(f"the weight of {module} is not finite at λ={setting.lam:g}, γ={setting.gamma:g}")
        inputs = problem.map.inputs
        tensors = {problem.map.weight: solution[:, :inputs].contiguous()}
        if solution.shape[1] > inputs:
            tensors[f"{module}.bias"] = solution[:, inputs].contiguous()
        condition = problem.posterior.condition(setting.lam)
        return Solved(tensors, condition if math.isfinite(condition) else None)

    def weights(self, settings: Mapping[str, Setting]) -> dict[str, torch.Tensor]:
        """Return every regressed parameter by canonical name, given a setting for each module."""
        return {
            name: tensor
            for module in self._problems
            for name, tensor in self.solve(module, settings[module]).tensors.items()
        }


def module_wise(maps: Sequence[LinearMap], weights: ExpertWeights, anchor: TensorOf, gram: GramOf) -> Assembler:
    """Return the assembler of weights regressed on the inputs that each expert sees; biases are left to the anchor.

    Args:
        maps: the maps to regress.
        weights: base and experts.
        anchor: gives the anchor's tensor by canonical name.
        gram: gives expert `t`'s Gram matrix `(in, in)` by (t, input group).
    """
    problems = []
    groups = _by_group(maps)
    with progress("factoring the Gram matrices", len(groups)) as bar:
        for group, members in groups.items():
            grams = [gram(index, group) for index in range(weights.count)]
            total = grams[0].clone()
            for part in grams[1:]:
                total += part
            spectrum = decompose(total, where=f"the input of {group}")
            for map_ in members:
                mean = anchor(map_.weight)
                experts = [weights.expert(index, map_.weight) for index in range(weights.count)]
                posterior = factor(spectrum, mean, residual(mean, experts, grams))
                problems.append(Problem(map_, posterior, weights.base(map_.weight)))
            bar.advance()
    return Assembler(problems)


def propagated(
    maps: Sequence[LinearMap], weights: ExpertWeights, anchor: TensorOf, moments: Callable[[str], Moments]
) -> Assembler:
    """Return the assembler of weights and biases regressed on what the merged model itself reads.

    Args:
        maps: the maps to regress.
        weights: base and experts.
        anchor: gives the anchor's tensor by canonical name.
        moments: gives the moments by input group.
    """
    problems = []
    groups = _by_group(maps)
    with progress("factoring the moments", len(groups)) as bar:
        for group, members in groups.items():
            found = moments(group)
            spectrum = found.spectrum(f"the input of {group}")
            for map_ in members:
                posterior = found.posterior(spectrum, map_.module, with_bias(map_, anchor))
                problems.append(Problem(map_, posterior, with_bias(map_, weights.base)))
            bar.advance()
    return Assembler(problems)


def with_bias(map_: LinearMap, get: TensorOf) -> torch.Tensor:
    """Return a map's `[W b]`, `(out, in + 1)` float64, or its `W` where it has no bias."""
    weight = get(map_.weight).to(torch.float64)
    if not map_.bias:
        return weight
    return torch.cat([weight, get(f"{map_.module}.bias").to(torch.float64)[:, None]], dim=1)


def _by_group(maps: Sequence[LinearMap]) -> dict[str, list[LinearMap]]:
    groups: dict[str, list[LinearMap]] = {}
    for map_ in maps:
        groups.setdefault(map_.input_group, []).append(map_)
    return groups
