"""What propagated regression needs to know of one group of maps: sums over rows, from which every `λ` follows.

The regression itself is `bmm.regression.posterior`; where the rows come from is `bmm.regression.propagate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bmm.errors import BMMError
from bmm.grams.products import ProductSum
from bmm.modules.linear import LinearMap
from bmm.regression.posterior import Posterior, Spectrum, decompose, factor
from bmm.regression.sample import error_from_moments

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """What the regression of one group needs, float64, each task weighted alike.

    Attributes:
        gram: `Σ_t X̃_tᵀX̃_t / rows_t`, `(in + 1, in + 1)`, or `(in, in)` where the maps have no bias.
        cross: by map, `Σ_t Y_tᵀX̃_t / rows_t`, `(out, in + 1)` or `(out, in)`.
        power: by map, `Σ_t Σ_rows Y_t² / rows_t`, `(out,)`.
        rows: each task's rows.
    """

    gram: Tensor
    cross: Mapping[str, Tensor]
    power: Mapping[str, Tensor]
    rows: tuple[int, ...]

    def spectrum(self, where: str) -> Spectrum:
        """Return the Gram's eigendecomposition."""
        return decompose(self.gram, where=where)

    def of_rows(self, module: str, rows: slice) -> Moments:
        """Return what the regression of some of one map's outputs needs: views, no copies."""
        return Moments(self.gram, {module: self.cross[module][rows]}, {module: self.power[module][rows]}, self.rows)

    def posterior(self, spectrum: Spectrum, module: str, anchor: Tensor) -> Posterior:
        """Return one map's posterior around the anchor `[W_a b_a]`, of the cross moment's shape."""
        return factor(spectrum, anchor.to(torch.float64), self.pull(module, anchor))

    def pull(self, module: str, anchor: Tensor) -> Tensor:
        """Return what draws one map away from the anchor: `Σ_t (Y_t − X̃_t [W_a b_a]ᵀ)ᵀ X̃_t / rows_t`, float64."""
        product = anchor.to(torch.float64) @ self.gram
        return torch.sub(self.cross[module], product, out=product)

    def error(self, module: str, solution: Tensor) -> float:
        """Return `Σ_t ‖X̃_t [W b]ᵀ − Y_t‖² / rows_t` of one map's solution, of the cross moment's shape."""
        return float(error_from_moments(solution, self.gram, self.cross[module], self.power[module]).sum())

    @property
    def nbytes(self) -> int:
        """Bytes of all sums."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Return all sums by name, to be stored; `rows` stands beside them."""
        named = {"gram": self.gram}
        named |= {f"cross:{module}": value for module, value in self.cross.items()}
        return named | {f"power:{module}": value for module, value in self.power.items()}

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel from a worker as numpy's arrays, which are sent from where they lie; torch's would be copied twice."""
        cross, power = ({name: value.numpy() for name, value in part.items()} for part in (self.cross, self.power))
        return _arrived, (self.gram.numpy(), cross, power, self.rows)


def _arrived(gram: Array, cross: Mapping[str, Array], power: Mapping[str, Array], rows: tuple[int, ...]) -> Moments:
    crosses, powers = ({name: _writeable(value) for name, value in part.items()} for part in (cross, power))
    return Moments(_writeable(gram), crosses, powers, rows)


def _writeable(array: Array) -> Tensor:
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def total(parts: list[Moments], weights: Sequence[float] | None = None) -> Moments:
    """Return the sum of moments, in the order given, each times its weight (1).

    The parts are used up, and the list is empty afterwards: those of an output head are as large as its weights are.
    """
    rows = tuple(count for part in parts for count in part.rows)
    kept = list(weights or [1.0] * len(parts))
    if len(kept) != len(parts):
        raise BMMError(f"{len(parts)} sums of moments were given with {len(kept)} weights")
    found = parts.pop(0)
    _scale(found, kept.pop(0))
    while parts:
        part = parts.pop(0)
        _scale(part, kept.pop(0))
        found.gram.add_(part.gram)
        for name, value in found.cross.items():
            value.add_(part.cross[name])
            found.power[name].add_(part.power[name])
    return replace(found, rows=rows)


def _scale(part: Moments, weight: float) -> None:
    if weight != 1:
        for value in (part.gram, *part.cross.values(), *part.power.values()):
            value.mul_(weight)


MINIMUM_ROUTED_ROWS = 16
"""An expert of a mixture that fewer calibration tokens reach, over all tasks, keeps the anchor."""


def trusted(moments: Moments, members: Sequence[LinearMap]) -> Moments:
    """Return the moments, or zeros (which keep the anchor) for an expert of a mixture that too few tokens reached."""
    if members[0].index is None or sum(moments.rows) >= MINIMUM_ROUTED_ROWS:
        return moments
    cross = {name: torch.zeros_like(value) for name, value in moments.cross.items()}
    power = {name: torch.zeros_like(value) for name, value in moments.power.items()}
    return Moments(torch.zeros_like(moments.gram), cross, power, moments.rows)


class TaskSums:
    """Sums over one task's batches: products in float32, sums in float64 (see `bmm.grams.products`)."""

    def __init__(self, members: Sequence[LinearMap]) -> None:
        self._members = members
        self._bias = members[0].bias is not None
        size = members[0].inputs + self._bias
        self._gram = ProductSum(size)
        self._cross = {map_.module: torch.zeros(map_.outputs, size, dtype=torch.float64) for map_ in members}
        self._power = {map_.module: torch.zeros(map_.outputs, dtype=torch.float64) for map_ in members}
        self._rows = 0

    def add(self, inputs: Tensor, targets: Mapping[str, Tensor]) -> None:
        """Add rows `(rows, in)` and, for each map, its targets `(rows, out)`."""
        rows = with_ones(inputs.to(torch.float32), self._bias)
        self._gram.add(rows)
        for name, target in targets.items():
            target = target.to(torch.float32)
            self._cross[name] += target.T @ rows
            self._power[name] += target.square().sum(0, dtype=torch.float64)
        self._rows += len(rows)

    def include(self, other: TaskSums) -> None:
        """Add the sums over other rows of the same task."""
        self._gram.include(other._gram)
        for name in self._cross:
            self._cross[name] += other._cross[name]
            self._power[name] += other._power[name]
        self._rows += other._rows

    def moments(self) -> Moments:
        """Return the sums over the number of rows; they are used up.

        Raises:
            BMMError: an input or a target was not finite.
        """
        gram = self._gram.total()
        sums = [gram, *self._cross.values(), *self._power.values()]
        check_finite(sums, self._members)
        for value in sums:
            value.mul_(1.0 / max(self._rows, 1))
        return Moments(gram, self._cross, self._power, (self._rows,))


def with_ones(rows: Tensor, bias: bool) -> Tensor:
    """Return rows `(rows, in)` with a column of ones where the map has a bias."""
    return torch.cat([rows, torch.ones(len(rows), 1)], dim=1) if bias else rows


def check_finite(sums: Sequence[Tensor], members: Sequence[LinearMap]) -> None:
    """Raise a BMMError that names the maps if a sum is not finite."""
    if not all(bool(torch.isfinite(value).all()) for value in sums):
        raise BMMError(f"the inputs or answers of {members[0].module} are not finite on the calibration rows")
