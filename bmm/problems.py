"""The posterior of every linear map, factored when it is asked for, those of one input together.

A search asks for every map at every trial, so all are held; where nothing is searched each is asked for once, and the
last few are enough. What a setting makes of a posterior is `bmm.assembly`; the mathematics `bmm.regression.posterior`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch

from bmm.errors import BMMError
from bmm.modules.linear import LinearMap
from bmm.progress import progress
from bmm.regression.evidence import Evidence
from bmm.regression.moments import MINIMUM_ROUTED_ROWS, Moments, trusted
from bmm.regression.posterior import Posterior, Pull, decompose, factor
from bmm.weights import ExpertWeights

Sums = tuple[float | None, tuple[tuple[str, float], ...]]
"""What a sum of Gram matrices may be asked for beside its group: `ρ`, and a weight for each expert, by name."""
AS_IT_IS: Sums = (None, ())
GramOf = Callable[[int, str, Sums], torch.Tensor]
TensorOf = Callable[[str], torch.Tensor]
_LAST = 2
"""Groups that are held where not all are: a checkpoint names the maps of a layer one after the other."""


@dataclass(frozen=True)
class Problem:
    """One map to be solved: its posterior around the anchor, and the base that `γ` scales from.

    Both are `(out, in)`, or `(out, in + 1)` where the bias, the last column, is solved too.
    """

    map: LinearMap
    posterior: Posterior
    base: torch.Tensor
    evidence: Evidence


class Problems(Mapping[str, Problem]):
    """The maps to solve, by module.

    Args:
        maps: all of them.
        factored: gives the problems of the maps that read one input, with Gram matrices summed as asked.
        biases: whether biases are solved too, where there are some.
        keep: hold all of them, factored now, rather than the last few asked for.
    """

    def __init__(
        self,
        maps: Sequence[LinearMap],
        factored: Callable[[Sequence[LinearMap], Sums], Sequence[Problem]],
        *,
        biases: bool,
        keep: bool,
    ) -> None:
        self.maps = {map_.module: map_ for map_ in maps}
        self._biases = biases
        self._groups: dict[str, list[LinearMap]] = {}
        for map_ in maps:
            self._groups.setdefault(map_.input_group, []).append(map_)

        def solved(group: str, sums: Sums = AS_IT_IS) -> dict[str, Problem]:
            return {problem.map.module: problem for problem in factored(self._groups[group], sums)}

        self._group = lru_cache(maxsize=None if keep else _LAST)(solved)
        self._other = lru_cache(maxsize=_LAST)(solved)
        if keep:
            with progress("factoring the Gram matrices", len(self._groups)) as bar:
                for group in self._groups:
                    self._group(group)
                    bar.advance()

    def __getitem__(self, module: str) -> Problem:
        """Return one map's problem."""
        return self._group(self.maps[module].input_group)[module]

    def at(self, module: str, sums: Sums) -> Problem:
        """Return one map's problem with Gram matrices summed in this way, factored anew for each other way."""
        return self[module] if sums == AS_IT_IS else self._other(self.maps[module].input_group, sums)[module]

    def __iter__(self) -> Iterator[str]:
        """Give the modules in the maps' order."""
        return iter(self.maps)

    def __len__(self) -> int:
        """Return the number of maps."""
        return len(self.maps)

    def parameters(self, module: str) -> tuple[str, ...]:
        """Return the canonical names of the parameters that a map's solution stands in."""
        map_ = self.maps[module]
        return map_.parameters if self._biases else (map_.weight,)


def module_wise(
    maps: Sequence[LinearMap],
    weights: ExpertWeights,
    anchor: TensorOf,
    gram: GramOf,
    rows: Callable[[str], int],
    *,
    keep: bool = True,
) -> Problems:
    """Return the problems of weights regressed on the inputs that each expert sees; biases are left to the anchor.

    Args:
        maps: the maps to regress.
        weights: base and experts.
        anchor: gives the anchor's tensor by canonical name.
        gram: gives expert `t`'s Gram matrix `(in, in)` by (t, input group, how it is to be summed).
        rows: gives the number of rows behind all experts' Grams by input group.
        keep: hold all factors.
    """

    def factored(members: Sequence[LinearMap], sums: Sums) -> list[Problem]:
        group = members[0].input_group
        size = members[0].inputs
        total = torch.zeros(size, size, dtype=torch.float64)
        pulls = {map_.module: Pull(map_.matrix(anchor, bias=False)) for map_ in members}
        if members[0].index is None or rows(group) >= MINIMUM_ROUTED_ROWS:
            # One expert's Gram matrix at a time.
            for index in range(weights.count):
                part = gram(index, group, sums)
                total += part
                for map_ in members:
                    pulls[map_.module].add(map_.matrix(partial(weights.expert, index), bias=False), part)
        spectrum = decompose(total, where=f"the input of {group}")
        problems = []
        for map_ in members:
            pull = pulls.pop(map_.module)
            posterior = factor(spectrum, pull.anchor, pull.total)
            evidence = Evidence.of(posterior, pull.energy, rows(group))
            problems.append(Problem(map_, posterior, map_.matrix(weights.base, bias=False), evidence))
        return problems

    return Problems(maps, factored, biases=False, keep=keep)


def propagated(
    maps: Sequence[LinearMap],
    weights: ExpertWeights,
    anchor: TensorOf,
    moments: Callable[[str], Moments],
    *,
    keep: bool = True,
) -> Problems:
    """Return the problems of weights and biases regressed on what the merged model itself reads.

    Args:
        maps: the maps to regress.
        weights: base and experts.
        anchor: gives the anchor's tensor by canonical name.
        moments: gives the moments by input group.
        keep: hold all factors.
    """

    def factored(members: Sequence[LinearMap], sums: Sums) -> list[Problem]:
        if sums != AS_IT_IS:
            raise BMMError("the moments of a walk are sums already and cannot be weighted anew")
        group = members[0].input_group
        found = trusted(moments(group), members)
        spectrum = found.spectrum(f"the input of {group}")
        problems = []
        for map_ in members:
            mean = map_.matrix(anchor)
            posterior = found.posterior(spectrum, map_.module, mean)
            evidence = Evidence.of(posterior, found.error(map_.module, mean), sum(found.rows))
            problems.append(Problem(map_, posterior, map_.matrix(weights.base), evidence))
        return problems

    return Problems(maps, factored, biases=True, keep=keep)
