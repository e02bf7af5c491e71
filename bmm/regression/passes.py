"""What a walk takes from forward passes: where a batch stands, an expert's answers, the merged model's inputs.

A step belongs to one batch for as long as the walk lasts; an observer to one pass, which it ends as soon as it has seen
all that is wanted. Not here: which passes are run, and what becomes of what they show (`bmm.regression.propagate`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bmm.errors import BMMError
from bmm.modules.chain import Batch, Call
from bmm.modules.linear import LinearMap
from bmm.modules.tokens import Tokens
from bmm.modules.watch import Addition, Observer, Product, Reached, Site


class Step:
    """One batch of one task: the hidden states that it has reached, and what its expert answered in this unit.

    Attributes:
        batch: the inputs of the network.
        tokens: which of its tokens are kept.
        expert_calls: what else the expert's layers are called with, by layer; of a network that is no chain, nothing.
        merged_calls: the same of the merged model.
        expert: the hidden states that reach the layer in work in the expert.
        merged: the same in the merged model.
        beyond: the expert's hidden states after that layer, where it has run to its end.
        answers: the expert's answers `(rows, out)` by map.
        totals: its residual stream `(rows, out)` after each map that writes to it.
        asked: whether these are there.
        routed: its matrices of maps that rows are routed to (a mixture's experts), by map.
    """

    def __init__(self, batch: Batch, tokens: Tokens) -> None:
        self.batch = batch
        self.tokens = tokens
        self.expert_calls: dict[str, Call] = {}
        self.merged_calls: dict[str, Call] = {}
        self.expert = self.merged = torch.empty(0)
        self.beyond: Tensor | None = None
        self.forget()

    def forget(self) -> None:
        """Let go of the last unit's answers."""
        self.answers: dict[str, Tensor] = {}
        self.totals: dict[str, Tensor] = {}
        self.routed: Mapping[str, Tensor] = {}
        self.asked = False

    def forget_answers(self) -> None:
        """Let go of answers that were for one group only."""
        self.answers, self.totals, self.asked = {}, {}, False

    @property
    def nbytes(self) -> int:
        """Bytes of what the expert has answered."""
        kept = [*self.answers.values(), *self.totals.values(), *([] if self.beyond is None else [self.beyond])]
        return sum(tensor.nbytes for tensor in kept)


class Answers(Observer):
    """What an expert answers in a unit; ends the pass when it has, unless it is to run to the end."""

    def __init__(self, maps: Sequence[LinearMap], *, to_the_end: bool) -> None:
        self._maps = {map_.site: map_ for map_ in maps if map_.index is None}
        self._left = _events(maps) if not to_the_end else 0
        self._products: dict[Site, Product] = {}
        self._answers: dict[str, list[Tensor]] = {}
        self._totals: dict[str, list[Tensor]] = {}

    def answered(self, product: Product, output: Tensor) -> None:
        """Keep what a map answers."""
        map_ = self._maps.get(product.site)
        if map_ is not None:
            self._products[product.site] = product
            # Copied: what comes after may change it in place.
            self._answers.setdefault(map_.module, []).append(product.kept(output).clone())
            self._count()

    def added(self, addition: Addition) -> None:
        """Keep the stream that an answer was added to, with the answer."""
        map_ = self._maps.get(addition.site)
        if map_ is not None and map_.stream:
            rows = self._products[addition.site].kept(addition.total).clone()
            self._totals.setdefault(map_.module, []).append(rows)
            self._count()

    def _count(self) -> None:
        self._left -= 1
        if self._left == 0:
            raise Reached

    def answers(self) -> dict[str, Tensor]:
        """Return the answers `(rows, out)` by map."""
        return {name: torch.cat(parts) if len(parts) > 1 else parts[0] for name, parts in self._answers.items()}

    def totals(self) -> dict[str, Tensor]:
        """Return the residual stream `(rows, out)` after each map that writes to it."""
        return {name: torch.cat(parts) if len(parts) > 1 else parts[0] for name, parts in self._totals.items()}


def _events(maps: Sequence[LinearMap]) -> int:
    """Return how often maps fire, and are added to the stream, in one pass; of a mixture's experts nobody knows."""
    return sum(map_.fires * (2 if map_.stream else 1) for map_ in maps if map_.index is None)


class Inputs(Observer):
    """What the merged model feeds to the maps of one group, and the stream that they will be added to.

    Ends the pass when each map has fired, and been added, as often as it does.
    """

    def __init__(self, members: Sequence[LinearMap]) -> None:
        self._first = members[0]
        self._maps = {map_.site: map_ for map_ in members}
        self._left = _events(members)
        self._products: dict[Site, Product] = {}
        self._inputs: list[Tensor] = []
        self._streams: dict[str, list[Tensor]] = {}

    def read(self, product: Product) -> None:
        """Keep what the maps read, once for all of them."""
        if product.site in self._maps:
            self._products[product.site] = product
            if product.site == self._first.site:
                self._inputs.append(product.kept(product.rows))
            self._count()

    def added(self, addition: Addition) -> None:
        """Keep the stream that an answer is added to, without the answer."""
        map_ = self._maps.get(addition.site)
        if map_ is not None and map_.stream:
            rows = self._products[addition.site].kept(addition.stream).clone()
            self._streams.setdefault(map_.module, []).append(rows)
            self._count()

    def _count(self) -> None:
        self._left -= 1
        if self._left == 0:
            raise Reached

    def inputs(self) -> Tensor:
        """Return the rows `(rows, in)`; none where no token was sent to this expert of a mixture."""
        if not self._inputs:
            if self._first.index is None:
                raise BMMError(f"the map {self._first.module} was not reached by a calibration row")
            return torch.empty(0, self._first.inputs)
        return torch.cat(self._inputs) if len(self._inputs) > 1 else self._inputs[0]

    def stream(self, map_: LinearMap) -> Tensor:
        """Return the residual stream `(rows, out)` before a map's answer is added to it."""
        parts = self._streams[map_.module]
        return torch.cat(parts) if len(parts) > 1 else parts[0]
