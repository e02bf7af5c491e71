"""The linear maps of an encoder, found by watching one forward pass.

A map is regressed on the Gram matrix of its input, and maps that read the same tensor (query, key and value; gate
and up) share one. Who shares is seen, not guessed: hooks record the very tensor object that reaches each
`torch.nn.Linear` while the architecture, without weights worth having, runs a few tokens. A map that never fires
its hook has no Gram and is left to the anchor; the coverage report says so.

Names here are canonical (without the head model's prefix). Collecting the Grams themselves is `bmm.grams.collect`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

# Matched against the end of a module's name, first match wins: more specific names first.
_TYPES = (
    ("qkv", r"((query|key|value|[qkv]|pos)_(proj|lin)|query|key|value|qkv|in_proj|query_key_value|attn\.[qkv])$"),
    ("attention-out", r"(attention\.output\.dense|attn\.out_proj|attention\.out_lin|[oO]_proj|attn\.c_proj)$"),
    ("attention-out", r"(self_attn|attention|attn)\.(out_proj|dense|proj|out|o)$"),
    ("mlp-in", r"(intermediate\.dense|lin1|fc1|gate_proj|up_proj|c_fc|wi(_\d)?|linear1|\.ffn)$"),
    ("mlp-out", r"(output\.dense|lin2|fc2|down_proj|mlp\.c_proj|wo|linear2|ffn_output)$"),
)
_LAYER = re.compile(r"(?:^|\.)(?:layers?|blocks?|h|transformer)\.(\d+)(?:\.|$)")


@dataclass(frozen=True)
class LinearMap:
    """One `torch.nn.Linear` inside the encoder; its weight is `(outputs, inputs)`.

    `input_group` is the name of the first map that reads the same inputs; `layer` is None outside the layer stack.
    """

    module: str
    outputs: int
    inputs: int
    input_group: str
    type: str
    layer: int | None
    bias: bool = True

    @property
    def parameters(self) -> tuple[str, ...]:
        """Canonical names of the weight and, where there is one, the bias."""
        return (self.weight, f"{self.module}.bias") if self.bias else (self.weight,)

    @property
    def weight(self) -> str:
        """Canonical name of the weight."""
        return f"{self.module}.weight"

    def to_json(self) -> dict[str, Any]:
        """Return the map as plain JSON values."""
        return dict(vars(self))

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> LinearMap:
        """Read a map back from `to_json`'s values."""
        return cls(**value)


def discover(encoder: torch.nn.Module, probe: Mapping[str, torch.Tensor]) -> tuple[LinearMap, ...]:
    """Return the encoder's linear maps in the order in which they fire.

    Args:
        encoder: the module whose parameters have canonical names; its weights may be anything.
        probe: a small batch of inputs for its forward pass.
    """
    seen: list[tuple[str, torch.nn.Linear, torch.Tensor]] = []
    handles = []
    for name, module in encoder.named_modules():
        if isinstance(module, torch.nn.Linear):

            def record(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], name: str = name) -> None:
                assert isinstance(module, torch.nn.Linear)  # noqa: S101 - for the type checker
                # The tensor itself is kept, so that its identity cannot be given to a later one.
                seen.append((name, module, inputs[0]))

            handles.append(module.register_forward_pre_hook(record))
    try:
        with torch.inference_mode():
            encoder(**probe)
    finally:
        for handle in handles:
            handle.remove()
    # A map may fire more than once in a pass (layers shared across depth, or a projection that serves positions too):
    # its Gram is over all that it reads, so only maps that read all the same tensors share one.
    read: dict[str, tuple[int, ...]] = {}
    found: dict[str, torch.nn.Linear] = {}
    for name, module, tensor in seen:
        found[name] = module
        read[name] = (*read.get(name, ()), id(tensor))
    first_reader: dict[tuple[int, ...], str] = {}
    maps = []
    for name, module in found.items():
        group = first_reader.setdefault(read[name], name)
        sizes = (module.out_features, module.in_features)
        maps.append(LinearMap(name, *sizes, group, module_type(name), layer_of(name), bias=module.bias is not None))
    return tuple(maps)


def module_type(name: str) -> str:
    """Return what a map does: `qkv`, `attention-out`, `mlp-in`, `mlp-out`, or `other`."""
    return next((kind for kind, pattern in _TYPES if re.search(pattern, name)), "other")


def layer_of(name: str) -> int | None:
    """Return the index of the layer that a module or parameter stands in, or None."""
    match = _LAYER.search(name)
    return int(match.group(1)) if match else None
