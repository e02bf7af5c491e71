"""The layers that a walk goes through one by one, if they are a chain, and what reaches the first of them.

What a chain is, and how a layer is called, is `bmm.modules.chain`; the walk is `bmm.regression.propagate`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor

from bmm.modules.chain import Batch, Call, calls, chained, entry, same_calls
from bmm.modules.residence import Give, Resident


@dataclass(frozen=True)
class Stack:
    """Layers that are a chain; none where every pass begins at the network's own beginning.

    Attributes:
        layers: the modules, in order.
        tuple_size: how many values a layer hands on, as `bmm.modules.chain.chained` counts them.
        must_run: layers hand something on to the next besides hidden states (T5's position bias), so that what they are
            called with is known only once all have run.
    """

    layers: tuple[str, ...] = ()
    tuple_size: int = 0
    must_run: bool = False

    def enter(self, resident: Resident, give: Give, batch: Batch) -> dict[str, Call]:
        """Return what each layer is called with in one pass, the first with the hidden states that reach it."""
        if not self.must_run:
            return entry(resident.encoder, self.layers, batch, self.tuple_size)
        with resident.passing(give):
            return calls(resident.encoder, self.layers, batch)


def find_stack(
    layers: tuple[str, ...],
    merged: Resident,
    expert: Resident,
    prior: Give,
    own: Give,
    solved: Collection[str],
    batch: Batch,
) -> Stack:
    """Return the stack of two encoders of one architecture, and divide their weights by its layers.

    Args:
        layers: modules that may be a chain.
        merged: the encoder of the model that is being solved.
        expert: that of an expert.
        prior: gives the weights that the walk begins with.
        own: gives the expert's.
        solved: the parameters that the walk will change.
        batch: a few rows of the expert's.
    """
    if layers and all(resident.divide(layers) for resident in (merged, expert)):
        found = _found(layers, merged, expert, prior, own, solved, batch)
        if found is not None:
            return found
    for resident in (merged, expert):
        resident.divide(())
    return Stack()


def _found(
    layers: tuple[str, ...],
    merged: Resident,
    expert: Resident,
    prior: Give,
    own: Give,
    solved: Collection[str],
    batch: Batch,
) -> Stack | None:
    expert.surround(own)
    with expert.passing(own):
        size = chained(expert.encoder, layers, batch)
        if size is None:
            return None
        real, quick = calls(expert.encoder, layers, batch), entry(expert.encoder, layers, batch, size)
        must_run = not same_calls(real, quick)

    # What else the merged model's layers are called with is taken once, so no map may have a say in it: with an
    # expert's maps in place of its own it must be the same.
    def mixed(name: str) -> Tensor:
        return own(name) if name in solved else prior(name)

    expert.surround(mixed)
    merged.surround(prior)
    with expert.passing(mixed), merged.passing(prior):
        same = same_calls(*(calls(resident.encoder, layers, batch) for resident in (expert, merged)))
    return Stack(layers, size, must_run) if same else None
