"""Gram matrices of an expert that need not fit into memory: its layers come one at a time, hidden states pass on.

Gives the same bytes as `bmm.grams.collect.collect` does with the whole expert in memory, since the same operators run
in the same order on the same rows; only which weights are there at a time differs. In memory: what stands outside the
layers, one layer, the hidden states of all rows between two layers, and one layer's sums. An encoder whose layers are
no chain (a decoder that also reads an encoder) is run as a whole for each batch, its layers' weights coming and going.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from bmm.grams.collect import Collection as Found
from bmm.grams.collect import GramSum, collect
from bmm.modules.chain import Batch, Call, calls, chained, entry, given, same_calls
from bmm.modules.linear import LinearMap
from bmm.modules.residence import Give, Resident
from bmm.modules.tokens import Sample, Tokens
from bmm.modules.units import layers_of, units_of
from bmm.modules.watch import Reached, Watch


class Stream:
    """An expert on its way through its calibration rows.

    Args:
        encoder: the expert's encoder; what its parameters hold does not matter.
        names: the parameters that `give` gives, by canonical name.
        give: gives a weight.
        batches: inputs of the forward passes.
        maps: one map of each input group that is wanted, in firing order.
        sample: what is kept of each sequence's tokens; without, all.
    """

    def __init__(
        self,
        encoder: nn.Module,
        names: Collection[str],
        give: Give,
        batches: Sequence[Batch],
        maps: Sequence[LinearMap],
        sample: Sample | None = None,
    ) -> None:
        self._encoder = encoder
        self._resident = Resident(encoder, names)
        self._give = give
        self._batches = batches
        self._maps = maps
        self._sample = sample
        self._tuple_size = 0
        self._must_run = False
        layers = layers_of(units_of(maps))
        self.layers = layers if batches and self._divided(layers) else ()

    def sums(self) -> Iterator[dict[str, GramSum]]:
        """Yield the sums of input groups, a layer's at a time; those outside of the layers come last.

        Raises:
            BMMError: as `collect` does.
        """
        if not self.layers:
            with self._resident.passing(self._give):
                yield collect(self._encoder, self._batches, self._maps, self._sample)
            return
        hidden, known = self._enter()
        tokens = [Tokens(batch, self._sample, place) for place, batch in enumerate(self._batches)]
        inside: dict[str, list[LinearMap]] = {}
        for unit in units_of(self._maps):
            inside.setdefault(unit.prefix if unit.prefix in self.layers else "", []).extend(unit.maps)
        for layer in self.layers:
            self._resident.bring(layer, self._give)
            module = self._encoder.get_submodule(layer)
            found = Found(inside[layer])
            with torch.inference_mode(), Watch(self._encoder, found) as watch:
                for place, those in enumerate(tokens):
                    watch.begin(those)
                    hidden[place], _ = known[place].pop(layer).through(module, hidden[place])
            self._resident.drop(layer)
            yield found.checked()
        if outside := inside.get("", []):
            found = Found(outside)
            for batch, last, those in zip(self._batches, hidden, tokens, strict=True):
                skipped = given(self._encoder, self.layers, last, self._tuple_size)
                found.begin()
                with torch.inference_mode(), skipped, Watch(self._encoder, found, those), suppress(Reached):
                    self._encoder(**batch)
            yield found.checked()

    def _divided(self, layers: tuple[str, ...]) -> bool:
        """Let layers come and go if they can, and say whether they are a chain."""
        if not layers or not self._resident.divide(layers):
            self._resident.divide(())
            self._resident.surround(self._give)
            return False
        self._resident.surround(self._give)
        first = {name: tensor[:2] for name, tensor in self._batches[0].items()}
        with self._resident.passing(self._give):
            size = chained(self._encoder, layers, first)
            if size is None:
                return False
            self._tuple_size = size
            real, quick = calls(self._encoder, layers, first), entry(self._encoder, layers, first, size)
            # Layers may hand something on to the next besides hidden states (T5's position bias).
            self._must_run = not same_calls(real, quick)
        return True

    def _enter(self) -> tuple[list[Tensor], list[dict[str, Call]]]:
        """Return what reaches the first layer in each batch, and how each layer is called."""
        hidden, known = [], []
        for batch in self._batches:
            if self._must_run:
                with self._resident.passing(self._give):
                    found = calls(self._encoder, self.layers, batch)
            else:
                found = entry(self._encoder, self.layers, batch, self._tuple_size)
            hidden.append(found[self.layers[0]].hidden)
            known.append({name: call.forget() for name, call in found.items()})
        return hidden, known
