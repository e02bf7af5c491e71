"""From hyperparameters to weights: the posterior of every linear map, ready for any `λ` and `γ`.

Built once a search from the summed Gram matrices (one eigendecomposition per distinct input) and the anchor; after
that, a new setting costs one matrix product a map. The mathematics of one map is `bmm.regression.posterior`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from bmm.modules.linear import LinearMap
from bmm.progress import progress
from bmm.regression.posterior import Posterior, assemble, decompose, factor, residual
from bmm.search.space import Setting
from bmm.weights import ExpertWeights

GramOf = Callable[[int, str], torch.Tensor]


@dataclass(frozen=True)
class Solved:
    """One map's published weight `(out, in)` float32 and the condition number behind it."""

    weight: torch.Tensor
    condition: float | None


class Assembler:
    """The regressed maps of one merge.

    Args:
        maps: the maps to regress.
        weights: base and experts.
        anchor: gives the anchor's tensor `(out, in)` by canonical name.
        gram: gives expert `t`'s Gram matrix `(in, in)` by (t, input group).
    """

    def __init__(
        self,
        maps: Sequence[LinearMap],
        weights: ExpertWeights,
        anchor: Callable[[str], torch.Tensor],
        gram: GramOf,
    ) -> None:
        self._maps = {map_.module: map_ for map_ in maps}
        self._base: dict[str, torch.Tensor] = {}
        self._posterior: dict[str, Posterior] = {}
        groups: dict[str, list[LinearMap]] = {}
        for map_ in maps:
            groups.setdefault(map_.input_group, []).append(map_)
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
                    self._posterior[map_.module] = factor(spectrum, mean, residual(mean, experts, grams))
                    self._base[map_.module] = weights.base(map_.weight)
                bar.advance()

    def solve(self, module: str, setting: Setting) -> Solved:
        """Return the weight of one map at one setting.

        `λ = ∞` with `γ = 1` gives the anchor's own weight, bit for bit.

        Raises:
            FloatingPointError: the weight is not finite.
        """
        posterior = self._posterior[module]
        mean = posterior.mean(setting.lam)
        weight = mean if setting.gamma == 1.0 else assemble(self._base[module], mean, setting.gamma)
        weight = weight.to(torch.float32)
        if not bool(torch.isfinite(weight).all()):
            raise FloatingPointError(f"the weight of {module} is not finite at λ={setting.lam:g}, γ={setting.gamma:g}")
        condition = posterior.condition(setting.lam)
        return Solved(weight, condition if math.isfinite(condition) else None)

    def weights(self, settings: Mapping[str, Setting]) -> dict[str, torch.Tensor]:
        """Return every regressed weight by canonical name, given a setting for each module."""
        return {self._maps[name].weight: self.solve(name, settings[name]).weight for name in self._maps}
