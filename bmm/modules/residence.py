"""An encoder of which only a part is in memory: its layers' weights come when they are needed, and go afterwards.

What stands outside the layers stays. Weights that are nobody else's (a table of an expert's own tokens) are left alone.
Where weights come from is the caller's; in which order layers are needed is `bmm.regression.propagate`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bmm.memory import give_back

Give = Callable[[str], Tensor]
"""Gives a parameter by canonical name, in any dtype."""


class Resident:
    """The weights of one encoder, as far as they are in memory; float32 there.

    Args:
        encoder: the module; what its parameters hold does not matter.
        names: the parameters that come from outside, by canonical name.
    """

    def __init__(self, encoder: nn.Module, names: Collection[str]) -> None:
        self.encoder = encoder
        config: Any = getattr(encoder, "config", None)
        if getattr(config, "use_cache", False):
            # A cache would grow with every time that a layer is run again.
            config.use_cache = False
        known = set(names)
        # Under every name: a tied parameter may be known by another than its first.
        self._everything = dict(encoder.named_parameters(remove_duplicate=False))
        self._parameters = {name: parameter for name, parameter in self._everything.items() if name in known}
        self._layers: dict[str, dict[str, nn.Parameter]] = {}
        self._outside = self._parameters

    def divide(self, layers: Sequence[str]) -> bool:
        """Let the weights of these layers, module prefixes, come and go from now on; with none, all weights stay.

        Says whether that is possible: not where a layer shares a weight with anything else.
        """
        holders: dict[int, set[str]] = {}
        for name, parameter in self._everything.items():
            holders.setdefault(id(parameter), set()).add(_layer(name, layers))
        if any(len(places) > 1 for places in holders.values()):
            return False
        self._layers = {layer: {} for layer in layers}
        self._outside = {}
        for name, parameter in self._parameters.items():
            self._layers.get(_layer(name, layers), self._outside)[name] = parameter
        for layer in layers:
            self.drop(layer)
        return True

    def surround(self, give: Give) -> None:
        """Bring in all that stands outside the layers."""
        _bring(self._outside, give)

    def bring(self, layer: str, give: Give) -> None:
        """Bring in the weights of one layer."""
        _bring(self._layers[layer], give)

    def drop(self, layer: str) -> None:
        """Let go of the weights of one layer."""
        freed = sum(parameter.nbytes for parameter in self._layers[layer].values())
        for parameter in self._layers[layer].values():
            parameter.data = torch.empty(0)
        give_back(freed)

    @contextmanager
    def passing(self, give: Give) -> Iterator[None]:
        """While this lasts the whole encoder can be run: each layer's weights come as it is reached, and go again."""
        handles = []
        for name in self._layers:
            layer = self.encoder.get_submodule(name)
            handles.append(layer.register_forward_pre_hook(lambda *_, name=name: self.bring(name, give)))
            handles.append(layer.register_forward_hook(lambda *_, name=name: self.drop(name), always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for name in self._layers:
                self.drop(name)


def _layer(name: str, layers: Sequence[str]) -> str:
    """Return the layer that a parameter stands in, or an empty name."""
    return next((layer for layer in layers if name.startswith(f"{layer}.")), "")


def _bring(parameters: Mapping[str, nn.Parameter], give: Give) -> None:
    # An inference tensor could not be written to afterwards.
    with torch.inference_mode(mode=False), torch.no_grad():
        for name, parameter in parameters.items():
            parameter.data = give(name).to(torch.float32, copy=True, memory_format=torch.contiguous_format)
