"""From hyperparameters to weights: what any `λ` and `γ` make of the posterior of every linear map.

A new setting costs one matrix product a map, once its posterior is factored (`bmm.problems`). What a walk through the
network has solved already is taken from it. The mathematics of one map is `bmm.regression.posterior`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch

from bmm.problems import Problem, Problems, TensorOf
from bmm.regression.evidence import Evidence
from bmm.regression.posterior import assemble
from bmm.search.setting import Setting

Spread = Callable[[Problem, float], torch.Tensor]
"""What is added to a map's posterior mean at `λ`, of its shape, float64: a draw's deviation."""


@dataclass(frozen=True)
class Solved:
    """One map's `[W b]` `(out, in + 1)`, or `W`, float32, and the condition number behind it.

    `anchored` says that no data spoke for it: the solution is the anchor's.
    """

    solution: torch.Tensor
    condition: float | None
    anchored: bool = False


class Assembler:
    """The regressed maps of one merge.

    Args:
        problems: the maps to solve.
        anchor: gives the anchor's tensor by canonical name, for the rest of a parameter that holds several matrices.
        walked: by map, the `λ` with which a walk through the network went on.
        walk_solved: gives what the walk made of a map at that `λ`.
    """

    def __init__(
        self,
        problems: Problems,
        anchor: TensorOf,
        walked: Mapping[str, float] = MappingProxyType({}),
        walk_solved: Callable[[str], Solved] | None = None,
    ) -> None:
        self.walked = walked
        self._problems = problems
        self._walk_solved = walk_solved
        self._anchor = anchor
        self._members: dict[str, list[str]] = {}
        for module in problems:
            for name in problems.parameters(module):
                self._members.setdefault(name, []).append(module)

    @property
    def parameters(self) -> Mapping[str, Sequence[str]]:
        """Canonical name of every regressed parameter, with the maps whose matrices it holds."""
        return self._members

    @property
    def problems(self) -> Mapping[str, Problem]:
        """The maps' problems by module."""
        return self._problems

    def problem(self, module: str, setting: Setting) -> Problem:
        """Return a map's problem with the sums and the anchor that a setting asks for."""
        problem = self._problems.at(module, setting.sums)
        if setting.anchor_scale == 1.0:
            return problem
        anchor = assemble(problem.base, problem.posterior.anchor, setting.anchor_scale)
        return replace(problem, posterior=problem.posterior.around(anchor))

    def solve(self, module: str, setting: Setting, spread: Spread | None = None) -> Solved:
        """Return one map's solution at one setting, with `spread` that of a draw rather than of the mean.

        `λ = ∞` with `γ = 1` gives the anchor's own, bit for bit.

        Raises:
            FloatingPointError: an entry is not finite.
        """
        if spread is None and (known := self._of_walk(module, setting)) is not None:
            return known
        problem = self.problem(module, setting)
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

    def trial(self, settings: Mapping[str, Setting]) -> dict[str, torch.Tensor]:
        """Return every regressed parameter as `weights` does, to float32's precision and in less than half the time.

        Raises:
            FloatingPointError: an entry is not finite.
        """
        tensors: dict[str, torch.Tensor] = {}
        for module in self._problems:
            if (known := self._of_walk(module, settings[module])) is not None:
                self._place(module, known.solution, tensors)
                continue
            problem, lam, gamma = self.problem(module, settings[module]), settings[module].lam, settings[module].gamma
            solution = problem.posterior.near_mean(lam)
            if gamma != 1.0:
                solution = torch.lerp(problem.base.to(torch.float32), solution, gamma)
            if not bool(torch.isfinite(solution).all()):
                raise FloatingPointError(f"the weight of {module} is not finite at λ={lam:g}, γ={gamma:g}")
            self._place(module, solution, tensors)
        return tensors

    def weights(self, settings: Mapping[str, Setting], spread: Spread | None = None) -> dict[str, torch.Tensor]:
        """Return every regressed parameter by canonical name, float32, at a setting for each map; see `solve`."""
        tensors: dict[str, torch.Tensor] = {}
        for module in self._problems:
            self._place(module, self.solve(module, settings[module], spread).solution, tensors)
        return tensors

    def parameter(self, name: str, settings: Mapping[str, Setting]) -> tuple[torch.Tensor, dict[str, Solved]]:
        """Return one regressed parameter, float32, and the solution of each map in it."""
        solved = {module: self.solve(module, settings[module]) for module in self._members[name]}
        tensors: dict[str, torch.Tensor] = {}
        for module, found in solved.items():
            self._place(module, found.solution, tensors)
        return tensors[name], solved

    def _of_walk(self, module: str, setting: Setting) -> Solved | None:
        """Return what the walk has made of a map, where this is the setting that it went on with."""
        if self._walk_solved is None or setting != Setting(self.walked.get(module, -1.0), 1.0):
            return None
        return self._walk_solved(module)

    def _place(self, module: str, solution: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        def into(name: str) -> torch.Tensor:
            if name not in tensors:
                tensors[name] = self._anchor(name).to(torch.float32, copy=True).contiguous()
            return tensors[name]

        self._problems.maps[module].place(solution, into)
