"""A task's moments for a wide output head, without its answers.

The expert's answers are `Y = X [W_t b_t]ᵀ`, so that

    YᵀX̃ = [W_t b_t] XᵀX̃        Σ_rows Y² = diag( [W_t b_t] XᵀX [W_t b_t]ᵀ )

and of a vocabulary of answers to each token none is ever computed. For narrower maps the answers are the cheaper way
(`bmm.regression.moments.TaskSums`); both are the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bmm.grams.products import ProductSum
from bmm.modules.linear import LinearMap
from bmm.modules.units import Unit
from bmm.regression.moments import Moments, check_finite, with_ones
from bmm.regression.room import without_answers

# As many outputs at a time are turned into float64.
_OUTPUTS = 4096


def output_head(units: Sequence[Unit]) -> Unit | None:
    """Return the last unit if it is one group behind the layers with many more outputs than inputs, else None.

    That is how a language model's output head stands; a pooler, or a projection, has no such shape.
    """
    last = units[-1] if units else None
    if last is None or last.prefix is not None or len(last.groups) != 1:
        return None
    plain = all(map_.index is None and not map_.stream for map_ in last.maps)
    outputs = sum(map_.outputs for map_ in last.maps)
    return last if plain and without_answers(last.maps[0].inputs, outputs) else None


class HeadSums:
    """Sums over one task's batches for maps of many more outputs than inputs, such as a language model's output head.

    Args:
        members: maps of one input.
        give: gives the expert's parameters, by canonical name; asked when the sums are done.
    """

    def __init__(self, members: Sequence[LinearMap], give: Callable[[str], Tensor]) -> None:
        self._members = members
        self._give = give
        self._bias = members[0].bias is not None
        size = members[0].inputs + self._bias
        self._gram, self._own = ProductSum(size), ProductSum(size)
        self._mixed = torch.zeros(size, size, dtype=torch.float64)
        self._rows = 0

    def add(self, inputs: Tensor, own: Tensor) -> None:
        """Add rows `(rows, in)` of the merged model, and those of the expert."""
        rows, theirs = (with_ones(part.to(torch.float32), self._bias) for part in (inputs, own))
        self._gram.add(rows)
        self._own.add(theirs)
        self._mixed += theirs.T @ rows
        self._rows += len(rows)

    def include(self, other: HeadSums) -> None:
        """Add the sums over other rows of the same task."""
        self._gram.include(other._gram)
        self._own.include(other._own)
        self._mixed += other._mixed
        self._rows += other._rows

    def moments(self) -> Moments:
        """Return the sums over the number of rows; they are used up.

        Raises:
            BMMError: an input or a weight was not finite.
        """
        count = max(self._rows, 1)
        gram, own, mixed = (part.mul_(1.0 / count) for part in (self._gram.total(), self._own.total(), self._mixed))
        cross, power = {}, {}
        for map_ in self._members:
            weight, bias = map_.part(self._give(map_.weight)), map_.bias_of(self._give)
            cross[map_.module] = torch.empty(map_.outputs, len(mixed), dtype=torch.float64)
            power[map_.module] = torch.empty(map_.outputs, dtype=torch.float64)
            for start in range(0, map_.outputs, _OUTPUTS):
                some = slice(start, start + _OUTPUTS)
                matrix = weight[some].to(torch.float64)
                if bias is not None:
                    matrix = torch.cat([matrix, bias[some, None].to(torch.float64)], dim=1)
                torch.matmul(matrix, mixed, out=cross[map_.module][some])
                # Rounding may take a sum of squares that is nothing below it.
                power[map_.module][some] = ((matrix @ own) * matrix).sum(1).clamp_(min=0)
        check_finite([gram, *cross.values(), *power.values()], self._members)
        return Moments(gram, cross, power, (self._rows,))
