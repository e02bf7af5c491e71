"""Gram matrices of one shard of calibration rows, seen in the forward passes of one expert.

A pure function from a model and its batches to sums: `S = XᵀX` and the number of rows in `X`, one pair per distinct
input, padding, or all but a sample of each sequence's tokens, left out before the product (`bmm.modules.tokens`,
`bmm.grams.products`). Where shards run and where sums are kept is not known here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from bmm.errors import BMMError
from bmm.grams.products import ProductSum
from bmm.modules.linear import LinearMap
from bmm.modules.tokens import Sample, Tokens
from bmm.modules.watch import Observer, Product, Reached, Watch


@dataclass
class GramSum:
    """The sum `XᵀX` `(in, in)` in float64 and the number of rows behind it."""

    total: torch.Tensor
    rows: int

    def add(self, other: GramSum) -> None:
        """Add another sum in place."""
        self.total += other.total
        self.rows += other.rows


def collect(
    encoder: torch.nn.Module,
    batches: Iterable[Mapping[str, torch.Tensor]],
    maps: Sequence[LinearMap],
    sample: Sample | None = None,
) -> dict[str, GramSum]:
    """Return the Gram sum of every input group over the batches.

    Args:
        encoder: the expert's encoder, weights loaded, in evaluation mode.
        batches: inputs of its forward pass; `attention_mask` `(rows, tokens)`, and a decoder's,
            mark what is not padding.
        maps: one map of each input group that is wanted.
        sample: what is kept of each sequence's tokens; without, all.

    Raises:
        BMMError: a map was never reached, or its input is not finite; the message names it.
    """
    found = Collection(maps)
    with torch.inference_mode(), Watch(encoder, found) as watch:
        for place, batch in enumerate(batches):
            watch.begin(Tokens(batch, sample, place))
            found.begin()
            with suppress(Reached):
                encoder(**batch)
    return found.checked()


class Collection(Observer):
    """The Gram sums of some maps' inputs, as a watch sees them.

    Args:
        maps: one map of each input group that is wanted.
    """

    def __init__(self, maps: Sequence[LinearMap]) -> None:
        self._maps = maps
        self._wanted = {map_.site: map_ for map_ in maps}
        self._sums: dict[str, ProductSum] = {}
        # Of a mixture's experts nobody knows beforehand how often they fire.
        known = all(map_.index is None for map_ in maps)
        self._firings = sum(map_.fires for map_ in maps) if known else 0
        self._left = 0

    def begin(self) -> None:
        """Let the pass that begins end (by `Reached`) with the last of the maps: what comes after is not read."""
        self._left = self._firings

    def checked(self) -> dict[str, GramSum]:
        """Return the sum of every input group; raises as `collect` does."""
        found: dict[str, GramSum] = {}
        for map_ in self._maps:
            name = map_.input_group
            if name not in self._sums and map_.index is None:
                raise BMMError(
                    f"the map {map_.module} was never reached by a calibration row, so it has no Gram matrix"
                )
            # Where no token was sent to an expert of a mixture there are no rows, and the regression keeps the anchor.
            product = self._sums.pop(name, None) or ProductSum(map_.inputs)
            found[name] = GramSum(product.total(), product.rows)
            if not bool(torch.isfinite(found[name].total).all()):
                raise BMMError(
                    f"the inputs of {name} are not finite on the calibration rows; is the expert's weight sound?"
                )
        return found

    def read(self, product: Product) -> None:
        """Add the rows of one product."""
        map_ = self._wanted.get(product.site)
        if map_ is None:
            return
        rows = product.kept(product.rows)
        if map_.input_group not in self._sums:
            self._sums[map_.input_group] = ProductSum(rows.shape[1])
        self._sums[map_.input_group].add(rows)
        self._left -= 1
        if self._left == 0:
            raise Reached
