"""Embeddings with rows of one expert's own behind the rows that all share.

The shared rows stay one parameter under its usual name, so that models which share an encoder share them; an expert's
own tokens live in a second parameter, `extra_weight`, that travels with its head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bmm.checkpoint.vocabulary import EXTRA, extra_name
from bmm.errors import BMMError


def extend(model: nn.Module, rows: Mapping[str, int]) -> None:
    """Give tables of a model further rows, not yet filled; tables that are tied share them.

    Args:
        model: as it was built, with the shared rows alone.
        rows: name of a parameter's further rows (from `extra_name`) -> how many.

    Raises:
        BMMError: such a parameter belongs to neither an embedding nor a linear map.
    """
    made: dict[int, nn.Parameter] = {}
    for name, module in model.named_modules():
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            count = rows.get(extra_name(f"{name}.{leaf}"))
            if id(parameter) in made:
                extra = made[id(parameter)]
                if not isinstance(module, nn.Embedding | nn.Linear):
                    # Another name for an output's bias, which the output adds itself.
                    continue
            elif count:
                extra = nn.Parameter(parameter.new_empty((count, *parameter.shape[1:])), requires_grad=False)
                made[id(parameter)] = extra
            else:
                continue
            module.register_parameter(f"{EXTRA}{leaf}", extra)
            _extend_class(module, len(extra))


def fill(model: nn.Module, tables: Mapping[str, Tensor]) -> None:
    """Give a model these further rows, in the place of any that it has.

    Args:
        model: one that shares its tables' own rows with nobody.
        tables: name of a parameter's further rows -> the rows.
    """
    parameters = dict(model.named_parameters())
    extend(model, {name: len(table) for name, table in tables.items() if name not in parameters})
    for name, table in tables.items():
        module = model.get_submodule(name.rpartition(".")[0])
        leaf = name.rpartition(".")[2]
        old = getattr(module, leaf)
        new = nn.Parameter(table.to(old.dtype, copy=True), requires_grad=False)
        module.register_parameter(leaf, new)
        if isinstance(module, nn.Embedding):
            module.num_embeddings += len(new) - len(old)


def joined(tables: Sequence[Mapping[str, Tensor]]) -> tuple[dict[str, Tensor], list[int]]:
    """Return the further rows of several experts one behind the other, and where each expert's begin.

    Args:
        tables: for each expert, name of a parameter's further rows -> the rows; nothing for an expert without any.
    """
    starts, total = [], 0
    for one in tables:
        starts.append(total)
        total += max((len(table) for table in one.values()), default=0)
    names = dict.fromkeys(name for one in tables for name in one)
    return {name: torch.cat([one[name] for one in tables if name in one]) for name in names}, starts


def shifted(batch: Mapping[str, Tensor], vocabulary: int, start: int) -> dict[str, Tensor]:
    """Return a batch whose tokens behind the shared vocabulary count from `start` there, as in tables `joined`."""
    return {
        name: torch.where(ids >= vocabulary, ids + start, ids) if name.endswith("input_ids") else ids
        for name, ids in batch.items()
    }


def _extend_class(module: Any, count: int) -> None:
    if isinstance(module, _Embedding | _Linear):
        return
    if isinstance(module, nn.Embedding):
        mixin: type = _Embedding
        module.num_embeddings += count
    elif isinstance(module, nn.Linear):
        mixin = _Linear
        module.out_features += count
    else:
        raise BMMError(f"rows cannot be added to a {type(module).__name__}")
    # A class of its own for each kind of table, since some architectures scale what theirs look up.
    module.__class__ = type(f"Extended{type(module).__name__}", (mixin, type(module)), {})


class _Embedding(nn.Embedding):
    """Looks up rows in `weight`, and those behind its end in `extra_weight`."""

    extra_weight: Tensor

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name
        """Return the rows, (…, width)."""
        known = self.weight.shape[0]
        beyond = input >= known
        if not bool(beyond.any()):
            return super().forward(input)
        found = super().forward(input.clamp(max=known - 1))
        own = functional_call(self, {"weight": self.extra_weight}, (input[beyond] - known,))
        assert isinstance(own, Tensor)  # noqa: S101 - narrows the type
        return found.masked_scatter(beyond[..., None], own)


class _Linear(nn.Linear):
    """Gives the answers of `weight`, then those of `extra_weight`."""

    extra_weight: Tensor

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name
        """Return the answers, (…, rows and further rows)."""
        own = nn.functional.linear(input, self.extra_weight, getattr(self, "extra_bias", None))
        return torch.cat([super().forward(input), own], dim=-1)
