"""The linear maps of an encoder, found by watching one forward pass.

A map is regressed on the Gram matrix of its input, and maps that read the same tensor (query, key and value; gate
and up) share one. Who shares is seen, not guessed: `bmm.modules.watch` sees every product of rows with a parameter
while the architecture, without weights worth having, runs a few rows. A matrix that is never multiplied has no Gram
and is left to the anchor; the coverage report says so. So is one that also serves as an embedding table.

Names here are canonical (without the head model's prefix). Collecting the Grams themselves is `bmm.grams.collect`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bmm.modules.watch import Addition, Observer, Product, Site, Watch

# Matched against the end of a module's name, first match wins: more specific names first.
_TYPES = (
    (
        "qkv",
        r"((query|key|value|[qkv]|pos)_(proj|lin)|query|key|value|qkv|in_proj|query_key_value|c_attn|attn\.[qkv])$",
    ),
    ("attention-out", r"(attention\.output\.dense|attn\.out_proj|attention\.out_lin|[oO]_proj|attn\.c_proj)$"),
    ("qkv", r"Attention\.[qkv]$"),
    ("attention-out", r"Attention\.o$"),
    ("attention-out", r"(self_attn|attention|attn)\.(out_proj|dense|proj|out|o)$"),
    (
        "mlp-in",
        r"(intermediate\.dense|lin1|fc1|gate_proj|up_proj|gate_up_proj|c_fc|wi(_\d)?|linear1|weights_in|\.ffn)$",
    ),
    ("mlp-out", r"(output\.dense|lin2|fc2|down_proj|mlp\.c_proj|wo|linear2|weights_out|ffn_output)$"),
)
_LAYER = re.compile(r"(?:^|\.)(?:layers?|blocks?|h|transformer)\.(\d+)(?:\.|$)")


@dataclass(frozen=True)
class LinearMap:
    """One linear map inside the encoder, `(outputs, inputs)`, wherever its matrix lies.

    Attributes:
        module: the map's own name: of its module, or of the part of a parameter that it is.
        outputs: size of what it answers.
        inputs: size of what it reads.
        input_group: name of the first map that reads the same inputs.
        type: see `module_type`.
        layer: index of the layer that it stands in; None outside the layer stack.
        weight: canonical name of the parameter that holds the matrix.
        bias: canonical name of the bias, or None.
        transposed: the parameter holds the matrix as `(in, out)` (GPT-2's `Conv1D`).
        index: place of the matrix in a stack `(experts, ..., ...)`, or None.
        rows: first and last (exclusive) row of the parameter where the matrix is only a part of it, or None.
        fires: times that it is multiplied in one pass.
        stream: its answer is added to the residual stream.
        scale: canonical name of what the answer is multiplied with before that, channel by channel, or None.
    """

    module: str
    outputs: int
    inputs: int
    input_group: str
    type: str
    layer: int | None
    weight: str
    bias: str | None = None
    transposed: bool = False
    index: int | None = None
    rows: tuple[int, int] | None = None
    fires: int = 1
    stream: bool = False
    scale: str | None = None

    @property
    def parameters(self) -> tuple[str, ...]:
        """Canonical names of the parameters that hold the weight and, where there is one, the bias."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def site(self) -> Site:
        """Where a watch sees the map."""
        return Site(self.weight, self.transposed, self.index, self.rows)

    def matrix(self, get: Callable[[str], Tensor], *, bias: bool = True) -> Tensor:
        """Return `[W b]` `(out, in + 1)`, or `W` without a bias (or with `bias=False`), float64.

        Args:
            get: gives a parameter by canonical name.
            bias: with the bias, where there is one, as last column.
        """
        weight = self.part(get(self.weight)).to(torch.float64)
        column = self.bias_of(get) if bias else None
        if column is None:
            return weight
        return torch.cat([weight, column.to(torch.float64)[:, None]], dim=1)

    def bias_of(self, get: Callable[[str], Tensor]) -> Tensor | None:
        """Return the map's bias `(out,)`, None without one."""
        if self.bias is None:
            return None
        column = get(self.bias)
        return column if self.rows is None else column[self.rows[0] : self.rows[1]]

    def part(self, parameter: Tensor) -> Tensor:
        """Return the map's matrix `(out, in)` as a view of its parameter."""
        if self.index is not None:
            parameter = parameter[self.index]
        if self.rows is not None:
            parameter = parameter[self.rows[0] : self.rows[1]]
        if parameter.ndim > 2:
            parameter = parameter.flatten(1)
        return parameter.T if self.transposed else parameter

    def place(self, solution: Tensor, into: Callable[[str], Tensor]) -> None:
        """Copy `[W b]` `(out, in + 1)`, or `W` alone, into the parameters that `into` gives by name, in place."""
        for name in self.parameters:
            self.place_one(name, solution, into(name))

    def place_one(self, name: str, solution: Tensor, into: Tensor) -> None:
        """Copy what `solution` says of one of the map's parameters into it, in place."""
        with torch.no_grad():
            if name == self.weight:
                self.part(into).copy_(solution[:, : self.inputs])
            elif solution.shape[1] > self.inputs:
                column = into if self.rows is None else into[self.rows[0] : self.rows[1]]
                column.copy_(solution[:, self.inputs])

    def to_json(self) -> dict[str, Any]:
        """Return the map as plain JSON values."""
        return {**vars(self), "rows": None if self.rows is None else list(self.rows)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> LinearMap:
        """Read a map back from `to_json`'s values."""
        rows = value["rows"]
        return cls(**{**value, "rows": None if rows is None else (int(rows[0]), int(rows[1]))})


def discover(encoder: torch.nn.Module, probe: Mapping[str, torch.Tensor]) -> tuple[LinearMap, ...]:
    """Return the encoder's linear maps in the order in which they fire.

    Args:
        encoder: the module whose parameters have canonical names; its weights may be anything.
        probe: a small batch of inputs for its forward pass.
    """
    watch = _Discovery()
    with torch.inference_mode(), Watch(encoder, watch):
        encoder(**probe)
    parameters = dict(encoder.named_parameters())
    # A map may fire more than once in a pass (layers shared across depth, or a projection that serves positions too):
    # its Gram is over all that it reads, so only maps that read all the same tensors share one.
    first_reader: dict[tuple[Any, ...], str] = {}
    maps = []
    for site, products in _complete(watch.seen, parameters).items():
        if site.weight in watch.tables:
            continue
        name = _name(site)
        parameter = parameters[site.weight]
        # Which tokens a mixture's expert reads is its own affair, whatever the probe made of it; and maps are solved
        # together with their biases, or without.
        tensors = (site,) if site.index is not None else tuple(product.identity for product in products)
        read = (products[0].bias is None, *tensors)
        map_ = LinearMap(
            module=name,
            outputs=0,
            inputs=0,
            input_group=first_reader.setdefault(read, name),
            type=module_type(_stem(site.weight)),
            layer=layer_of(name),
            weight=site.weight,
            bias=products[0].bias,
            transposed=site.transposed,
            index=site.index,
            rows=site.rows,
            fires=1 if site.index is not None else len(products),
            stream=site in watch.streams,
            scale=watch.streams.get(site),
        )
        outputs, inputs = map_.part(parameter).shape
        maps.append(replace(map_, outputs=outputs, inputs=inputs))
    return tuple(maps)


class _Discovery(Observer):
    # Of a model with billions of parameters the arithmetic alone would take seconds.
    of_shapes_alone = True

    def __init__(self) -> None:
        self.seen: dict[Site, list[Product]] = {}
        self.streams: dict[Site, str | None] = {}
        self.tables: set[str] = set()

    def read(self, product: Product) -> None:
        self.seen.setdefault(product.site, []).append(product)

    def added(self, addition: Addition) -> None:
        self.streams[addition.site] = addition.scale

    def embedded(self, weight: str) -> None:
        self.tables.add(weight)


def _complete(seen: Mapping[Site, list[Product]], parameters: Mapping[str, Tensor]) -> dict[Site, list[Product]]:
    """Add the experts of a mixture which no token of the probe was sent to; a stack's matrices stand together."""
    complete: dict[Site, list[Product]] = {}
    for site, products in seen.items():
        if site.index is None:
            complete[site] = products
        else:
            for index in range(parameters[site.weight].shape[0]):
                complete.setdefault(replace(site, index=index), products)
    return complete


def _name(site: Site) -> str:
    name = _stem(site.weight)
    if site.index is not None:
        name = f"{name}.{site.index}"
    return name if site.rows is None else f"{name}[{site.rows[0]}:{site.rows[1]}]"


def _stem(weight: str) -> str:
    """Return a module's name from its weight's: `q_proj.weight`, `in_proj_weight`, or a parameter's own name."""
    return weight.removesuffix(".weight").removesuffix("_weight")


def module_type(name: str) -> str:
    """Return what a map does: `qkv`, `attention-out`, `mlp-in`, `mlp-out`, or `other`."""
    return next((kind for kind, pattern in _TYPES if re.search(pattern, name)), "other")


def layer_of(name: str) -> int | None:
    """Return the index of the layer that a module or parameter stands in, or None."""
    match = _LAYER.search(name)
    return int(match.group(1)) if match else None


def layer_prefix(name: str) -> str | None:
    """Return the name of the layer that a module or parameter stands in: everything up to its index; or None."""
    match = _LAYER.search(name)
    return name[: match.end(1)] if match else None
