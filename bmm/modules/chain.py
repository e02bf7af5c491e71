"""Running an encoder layer by layer: what a layer is called with, what it makes of hidden states, what comes after.

Only where the layers are a chain, each fed by the one before it alone. Whether they are is found by trying
(`chained`), as is whether their other arguments depend on weights that change (`same_calls`); what is done at each
layer is `bmm.regression.propagate`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from bmm.modules.watch import Reached

Batch = Mapping[str, Tensor]
_TOLERANCE = 1e-4


class Call:
    """How an encoder calls one of its layers: every argument but the hidden states."""

    def __init__(self, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        self.hidden: Tensor = arguments[0] if arguments else keywords["hidden_states"]
        self._arguments = arguments[1:]
        self._positional = bool(arguments)
        self._keywords = {name: value for name, value in keywords.items() if name != "hidden_states"}

    def forget(self) -> Call:
        """Let go of the hidden states."""
        self.hidden = torch.empty(0)
        return self

    def through(self, layer: nn.Module, hidden: Tensor) -> tuple[Tensor, int]:
        """Return what a layer makes of hidden states, and the size of the tuple that it says so in (0: in none)."""
        if self._positional:
            output = layer(hidden, *self._arguments, **self._keywords)
        else:
            output = layer(hidden_states=hidden, **self._keywords)
        return (output[0], len(output)) if isinstance(output, tuple) else (output, 0)

    def same(self, other: Call) -> bool:
        """Say whether two models give a layer the same arguments, hidden states apart."""
        mine, theirs = self._tensors(), other._tensors()
        return len(mine) == len(theirs) and all(
            left.shape == right.shape and torch.equal(left, right) for left, right in zip(mine, theirs, strict=True)
        )

    def _tensors(self) -> list[Tensor]:
        return list(_tensors([self._arguments, self._keywords]))


def calls(encoder: nn.Module, layers: Sequence[str], batch: Batch) -> dict[str, Call]:
    """Run an encoder as far as its last layer, and return how it calls each layer."""
    found: dict[str, Call] = {}
    if not layers:
        return found
    last = layers[-1]

    def record(name: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        found[name] = Call(arguments, keywords)
        if name == last:
            raise Reached

    handles = [
        encoder.get_submodule(name).register_forward_pre_hook(
            lambda _, arguments, keywords, name=name: record(name, arguments, keywords), with_kwargs=True
        )
        for name in layers
    ]
    try:
        with torch.inference_mode():
            encoder(**batch)
    except Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found


def chained(encoder: nn.Module, layers: Sequence[str], batch: Batch) -> int | None:
    """Return the size of the tuples that the layers answer in, 0 for none.

    None where running layer after layer is not what the encoder does.
    """
    found = calls(encoder, layers, batch)
    if not layers or set(found) != set(layers):
        return None
    hidden, size = found[layers[0]].hidden, 0
    for name in layers:
        call = found[name]
        if hidden.shape != call.hidden.shape or not torch.allclose(
            hidden, call.hidden, rtol=_TOLERANCE, atol=_TOLERANCE
        ):
            return None
        with torch.inference_mode():
            hidden, size = call.through(encoder.get_submodule(name), hidden)
    return size


def same_calls(mine: Mapping[str, Call], theirs: Mapping[str, Call]) -> bool:
    """Say whether layers are called alike twice, hidden states apart."""
    return set(mine) == set(theirs) and all(mine[name].same(theirs[name]) for name in mine)


def entry(encoder: nn.Module, layers: Sequence[str], batch: Batch, size: int) -> dict[str, Call]:
    """Return how an encoder calls each of its layers, without running them.

    True of the first one's hidden states, and of all else that does not depend on what layers make of them.
    """
    found: dict[str, Call] = {}

    def stand_in(name: str, layer: nn.Module) -> nn.Module:
        def pass_on(*arguments: Any, **keywords: Any) -> Any:
            found[name] = Call(arguments, keywords)
            if name == layers[-1]:
                raise Reached
            return _answer(found[name].hidden, size)

        return _StandIn(pass_on, layer)

    with _replaced(encoder, layers, stand_in), torch.inference_mode(), suppress(Reached):
        encoder(**batch)
    return found


@contextmanager
def given(encoder: nn.Module, layers: Sequence[str], hidden: Tensor, size: int) -> Iterator[None]:
    """Let every layer return `hidden`: what comes after the layers sees the last one's outcome, at no cost."""
    outcome = _answer(hidden, size)
    with _replaced(encoder, layers, lambda _, layer: _StandIn(lambda *_, **__: outcome, layer)):
        yield


def _answer(hidden: Tensor, size: int) -> Any:
    """Return hidden states as a layer answers; what else is in its tuple (attention weights) nobody asks for."""
    return (hidden, *[None] * (size - 1)) if size else hidden


@contextmanager
def _replaced(
    encoder: nn.Module, layers: Sequence[str], stand_in: Callable[[str, nn.Module], nn.Module]
) -> Iterator[None]:
    real = {name: encoder.get_submodule(name) for name in layers}
    try:
        for name, layer in real.items():
            encoder.set_submodule(name, stand_in(name, layer))
        yield
    finally:
        for name, layer in real.items():
            encoder.set_submodule(name, layer)


class _StandIn(nn.Module):
    """Answers in a layer's place; in all else it is that layer."""

    def __init__(self, answer: Callable[..., Any], layer: nn.Module) -> None:
        super().__init__()
        self._answer = answer
        # In a tuple, so that it does not become a submodule with parameters.
        self._layer = (layer,)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"][0], name)

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """Return the answer."""
        return self._answer(*arguments, **keywords)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
