"""From hyperparameters to weights: the posterior of every linear map, ready for any `λ` and `γ`.

Built once a search, from the experts' Gram matrices (`module_wise`) or from the moments of a walk through the network
(`propagated`), by one eigendecomposition per distinct input; after that, a new setting costs one matrix product a map.
The mathematics of one map is `bmm.regression.posterior`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import torch

from bmm.modules.linear import LinearMap
from bmm.progress import progress
from bmm.regression.evidence import Evidence
from bmm.regression.moments import MINIMUM_ROUTED_ROWS, Moments, trusted
from bmm.regression.posterior import Posterior, assemble, decompose, factor, residual_and_energy
from bmm.search.space import Setting
from bmm.weights import ExpertWeights

GramOf = Callable[[int, str], torch.Tensor]
TensorOf = Callable[[str], torch.Tensor]
Spread = Callable[["Problem", float], torch.Tensor]
"""What is added to a map's posterior mean at `λ`, of its shape, float64: a draw's deviation."""


@dataclass(frozen=True)
class Solved:
    """One map's `[W b]` `(out, in + 1)`, or `W`, float32, and the condition number behind it.

    `anchored` says that no data spoke for it: the solution is the anchor's.
    """

    solution: torch.Tensor
    condition: float | None
    anchored: bool = False


@dataclass(frozen=True)
class Problem:
    """One map to be solved: its posterior around the anchor, and the base that `γ` scales from.

    Both are `(out, in)`, or `(out, in + 1)` where the bias, the last column, is solved too.
    """

    map: LinearMap
    posterior: Posterior
    base: torch.Tensor
    evidence: Evidence

    @property
    def parameters(self) -> tuple[str, ...]:
        """Canonical names of the parameters that the solution stands in."""
        with_bias = self.base.shape[1] > self.map.inputs
        return self.map.parameters if with_bias else (self.map.weight,)


class Assembler:
    """The regressed maps of one merge.

    Args:
        problems: the maps to solve.
        anchor: gives the anchor's tensor by canonical name, for the rest of a parameter that holds several matrices.
        walked: by map, the `λ` with which a walk through the network went on.
    """

    def __init__(
        self, problems: Sequence[Problem], anchor: TensorOf, walked: Mapping[str, float] = MappingProxyType({})
    ) -> None:
        self.walked = walked
        self._problems = {problem.map.module: problem for problem in problems}
        self._anchor = anchor
        self._members: dict[str, list[str]] = {}
        for module, problem in self._problems.items():
            for name in problem.parameters:
                self._members.setdefault(name, []).append(module)

    @property
    def parameters(self) -> Mapping[str, Sequence[str]]:
        """Canonical name of every regressed parameter, with the maps whose matrices it holds."""
        return self._members

    @property
    def problems(self) -> Mapping[str, Problem]:
        """The maps' problems by module."""
        return self._problems

    def solve(self, module: str, setting: Setting, spread: Spread | None = None) -> Solved:
        """Return one map's solution at one setting, with `spread` that of a draw rather than of the mean.

        `λ = ∞` with `γ = 1` gives the anchor's own, bit for bit.

        Raises:
            FloatingPointError: an entry is not finite.
        """
        problem = self._problems[module]
        mean = problem.posterior.mean(setting.lam)
        if spread is not None:
            mean += spread(problem, setting.lam)
        solution = (mean if setting.gamma == 1.0 else assemble(problem.base, mean, setting.gamma)).to(torch.float32)
        if not bool(torch.isfinite(solution).all()):
            raise FloatingPointError(f"the weight of {module} is not finite at λ={setting.lam:g}, γ={setting.gamma:g}")
        condition = problem.posterior.condition(setting.lam)
        anchored = problem.posterior.spectrum.trace == 0
        return Solved(solution, condition if math.isfinite(condition) else None, anchored)

    def evidence(self, module: str) -> Evidence:
        """Return the evidence of one map, from which the most probable strength follows."""
        return self._problems[module].evidence

    def weights(self, settings: Mapping[str, Setting], spread: Spread | None = None) -> dict[str, torch.Tensor]:
        """Return every regressed parameter by canonical name, float32, at a setting for each map; see `solve`."""
        tensors: dict[str, torch.Tensor] = {}
        for module, problem in self._problems.items():
            self._place(problem, self.solve(module, settings[module], spread).solution, tensors)
        return tensors

    def parameter(self, name: str, settings: Mapping[str, Setting]) -> tuple[torch.Tensor, dict[str, Solved]]:
        """Return one regressed parameter, float32, and the solution of each map in it."""
        solved = {module: self.solve(module, settings[module]) for module in self._members[name]}
        tensors: dict[str, torch.Tensor] = {}
        for module, found in solved.items():
            self._place(self._problems[module], found.solution, tensors)
        return tensors[name], solved

    def _place(self, problem: Problem, solution: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        def into(name: str) -> torch.Tensor:
            if name not in tensors:
                tensors[name] = self._anchor(name).to(torch.float32, copy=True).contiguous()
            return tensors[name]

        problem.map.place(solution, into)


def module_wise(
    maps: Sequence[LinearMap], weights: ExpertWeights, anchor: TensorOf, gram: GramOf, rows: Callable[[str], int]
) -> Assembler:
    """Return the assembler of weights regressed on the inputs that each expert sees; biases are left to the anchor.

    Args:
        maps: the maps to regress.
        weights: base and experts.
        anchor: gives the anchor's tensor by canonical name.
        gram: gives expert `t`'s Gram matrix `(in, in)` by (t, input group).
        rows: gives the number of rows behind all experts' Grams by input group.
    """
    problems = []
    groups = _by_group(maps)
    with progress("factoring the Gram matrices", len(groups)) as bar:
        for group, members in groups.items():
            grams = [gram(index, group) for index in range(weights.count)]
            total = grams[0].clone()
            for part in grams[1:]:
                total += part
            if members[0].index is not None and rows(group) < MINIMUM_ROUTED_ROWS:
                grams = [torch.zeros_like(part) for part in grams]
                total.zero_()
            spectrum = decompose(total, where=f"the input of {group}")
            for map_ in members:
                mean = map_.matrix(anchor, bias=False)
                experts = [map_.matrix(partial(weights.expert, index), bias=False) for index in range(weights.count)]
                pull, energy = residual_and_energy(mean, experts, grams)
                posterior = factor(spectrum, mean, pull)
                evidence = Evidence(posterior, energy, rows(group))
                problems.append(Problem(map_, posterior, map_.matrix(weights.base, bias=False), evidence))
            bar.advance()
    return Assembler(problems, anchor)


def propagated(
    maps: Sequence[LinearMap],
    weights: ExpertWeights,
    anchor: TensorOf,
    moments: Callable[[str], Moments],
    walked: Mapping[str, float] = MappingProxyType({}),
) -> Assembler:
    """Return the assembler of weights and biases regressed on what the merged model itself reads.

    Args:
        maps: the maps to regress.
        weights: base and experts.
        anchor: gives the anchor's tensor by canonical name.
        moments: gives the moments by input group.
        walked: by map, the `λ` with which the walk went on.
    """
    problems = []
    groups = _by_group(maps)
    with progress("factoring the moments", len(groups)) as bar:
        for group, members in groups.items():
            found = trusted(moments(group), members)
            spectrum = found.spectrum(f"the input of {group}")
            for map_ in members:
                mean = map_.matrix(anchor)
                posterior = found.posterior(spectrum, map_.module, mean)
                evidence = Evidence(posterior, found.error(map_.module, mean), sum(found.rows))
                problems.append(Problem(map_, posterior, map_.matrix(weights.base), evidence))
            bar.advance()
    return Assembler(problems, anchor, walked)


def _by_group(maps: Sequence[LinearMap]) -> dict[str, list[LinearMap]]:
    groups: dict[str, list[LinearMap]] = {}
    for map_ in maps:
        groups.setdefault(map_.input_group, []).append(map_)
    return groups
