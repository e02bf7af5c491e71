"""What the tensors in a PEFT adapter's file are, told by their names: parts of low-rank adapters, or whole tensors.

Which weight of the base they change is `bmm.checkpoint.adapter`'s question.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from bmm.checkpoint.shards import StoredTensor
from bmm.errors import CheckpointError

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PART = re.compile(
    r"(?P<module>.+)\.(?:(?P<down>lora_A\.weight|lora_embedding_A)|(?P<up>lora_B\.weight|lora_embedding_B)"
    r"|(?P<bias>lora_B\.bias)|(?P<magnitude>lora_magnitude_vector(?:\.weight)?)"
    r"|(?P<tokens>token_adapter\.trainable_tokens_delta))"
)
_WRAPPED = re.compile(r"\.(base_layer|modules_to_save|token_adapter)(?=\.)")


@dataclass
class Contents:
    """An adapter file's tensors: by module and part, or under the name of the tensor that they replace."""

    parts: dict[str, dict[str, StoredTensor]] = field(default_factory=dict)
    whole: dict[str, StoredTensor] = field(default_factory=dict)


def sorted_out(path: Path, stored: list[StoredTensor]) -> Contents:
    """Sort an adapter's tensors into parts of low-rank adapters and whole tensors.

    Args:
        path: the adapter's folder, for messages.
        stored: what its file holds.

    Raises:
        CheckpointError: a tensor is neither.
    """
    contents = Contents()
    copies: dict[str, StoredTensor] = {}
    for tensor in sorted(stored, key=lambda tensor: tensor.key):
        name = tensor.info.name.removeprefix(_PREFIX)
        found = _PART.fullmatch(name)
        if found is not None:
            part = str(found.lastgroup)
            contents.parts.setdefault(_WRAPPED.sub("", found["module"]), {})[part] = tensor
        elif name == tensor.info.name or "lora_" in name or "trainable_tokens" in name:
            raise CheckpointError(
                f"{path / ADAPTER_WEIGHTS} has the tensor '{tensor.key}', which is no part of a LoRA adapter as PEFT "
                "writes it; save the whole model with `merge_and_unload()` and `save_pretrained`"
            )
        elif ".original_module." not in name:
            # With `bias: all` PEFT stores a trained module's bias a second time, under the wrapper's name.
            (copies if ".modules_to_save." in name else contents.whole)[_WRAPPED.sub("", name)] = tensor
    contents.whole = copies | contents.whole
    return contents
