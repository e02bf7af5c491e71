"""What a PEFT adapter of the LoRA family does to one weight: its settings, read and checked, and the arithmetic.

LoRA (arXiv 2106.09685) adds `s · B A` to a weight, rank-stabilised LoRA (arXiv 2312.03732) with another `s`; DoRA
(arXiv 2402.09353) then gives each output a norm of its own. Names follow `adapter_config.json`. Which stored tensor
belongs to which weight is `bmm.checkpoint.adapter`'s question.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from bmm.checkpoint.shards import read_json_object
from bmm.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

ADAPTER_CONFIG = "adapter_config.json"
# With one of these an adapter is no fixed change of its base's weights, or one that is made in another way.
_REFUSED = (
    *("alora_invocation_tokens", "use_qalora", "monteclora_config", "layer_replication", "target_parameters"),
    *("use_bdlora", "arrow_config", "kasa_config", "megatron_config"),
)
# Others (pissa, olora, corda, loftq) change the base's weights before training, and only their own library knows how.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")

_Value = TypeVar("_Value")

Orientation = Literal["rows", "columns", "convolution"]
"""How a weight is stored: `(out, in)`, `(in, out)` (GPT-2's Conv1D, embeddings), or `(out, in, …)`."""


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """The part of `adapter_config.json` that decides what the adapter's tensors mean."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rank_stabilised: bool
    transposed: bool
    keeps_ties: bool
    base: str | None
    task_type: str | None
    model_class: str | None
    token_indices: Mapping[str, tuple[int, ...]]

    @classmethod
    def read(cls, folder: Path) -> LoraSettings:
        """Read and check the settings of the adapter in a folder.

        Raises:
            CheckpointError: another kind of adapter than LoRA, or a variant whose weights cannot be computed.
        """
        file = folder / ADAPTER_CONFIG
        values = read_json_object(file)
        kind = values.get("peft_type")
        if kind != "LORA":
            raise CheckpointError(
                f"{file}: adapters of peft_type '{kind}' cannot be merged, only LORA (with or without DoRA); save the "
                "whole model with `merge_and_unload()` and `save_pretrained`"
            )
        variant = next((name for name in _REFUSED if values.get(name)), None)
        start = values.get("init_lora_weights", True)
        if variant is None and not any(start is known or start == known for known in _STARTS):
            variant = f"init_lora_weights: {start}"
        if variant is not None:
            raise CheckpointError(
                f"{file}: a LORA adapter with '{variant}' cannot be merged from its files alone; save the whole model "
                "with `merge_and_unload()` and `save_pretrained`"
            )
        mapping = values.get("auto_mapping") or {}
        try:
            for pattern in (*(values.get("rank_pattern") or {}), *(values.get("alpha_pattern") or {})):
                re.compile(pattern)
            return cls(
                rank=int(values.get("r", 8)),
                alpha=float(values.get("lora_alpha", 8)),
                rank_pattern={str(name): int(rank) for name, rank in (values.get("rank_pattern") or {}).items()},
                alpha_pattern={str(name): float(alpha) for name, alpha in (values.get("alpha_pattern") or {}).items()},
                rank_stabilised=bool(values.get("use_rslora")),
                transposed=bool(values.get("fan_in_fan_out")),
                keeps_ties=bool(values.get("ensure_weight_tying")),
                base=values.get("base_model_name_or_path") or None,
                task_type=values.get("task_type"),
                model_class=mapping.get("base_model_class"),
                token_indices=_token_indices(values.get("trainable_token_indices")),
            )
        except (AttributeError, TypeError, ValueError, re.error) as error:
            raise CheckpointError(
                f"{file} is not an adapter's configuration ({error}); save the adapter again"
            ) from None

    def rank_of(self, module: str) -> int:
        """Return the rank of one module's adapter."""
        return _matched(self.rank_pattern, module, self.rank)

    def scaling(self, module: str) -> float:
        """Return `s`: `alpha / rank`, or `alpha / √rank` where it is rank-stabilised."""
        rank, alpha = self.rank_of(module), _matched(self.alpha_pattern, module, self.alpha)
        return alpha / math.sqrt(rank) if self.rank_stabilised else alpha / rank


def adapted(
    weight: Tensor, down: Tensor, up: Tensor, scaling: float, magnitude: Tensor | None, orientation: Orientation
) -> Tensor:
    """Return the weight with its adapter merged in, float32, in the shape of `weight`.

    Args:
        weight: the base's weight, as `orientation` says.
        down: `A`, (rank, in, …).
        up: `B`, (out, rank, …).
        scaling: `s`.
        magnitude: DoRA's norm of each output, `out` entries; None for LoRA.
        orientation: how the weight is stored.
    """
    import torch

    weight = weight.to(torch.float32)
    change = up.to(torch.float32).flatten(1) @ down.to(torch.float32).flatten(1)
    if orientation == "columns":
        change = change.T
    merged = weight + (change * scaling).reshape(weight.shape)
    if magnitude is None:
        return merged
    by_output = merged.T if orientation == "columns" else merged.flatten(1)
    factor = magnitude.to(torch.float32).flatten() / torch.linalg.norm(by_output, dim=1)
    shape = (1, -1) if orientation == "columns" else (-1, *(1,) * (merged.ndim - 1))
    scaled: Tensor = factor.view(shape) * merged
    return scaled


def _matched(patterns: Mapping[str, _Value], module: str, default: _Value) -> _Value:
    """Return the value of the first pattern that a module's name ends in, as PEFT matches them."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _token_indices(value: Any) -> dict[str, tuple[int, ...]]:
    """Return, by the end of an embedding's name, the rows that were trained alone; a bare list is the input's."""
    if not value:
        return {}
    named = value if isinstance(value, dict) else {"": value}
    return {str(name): tuple(int(index) for index in indices) for name, indices in named.items()}
