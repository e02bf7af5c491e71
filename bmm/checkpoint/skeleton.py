"""The shape of a model without its weights: what an adapter's names refer to. Built by transformers on the meta device.

Needed because an adapter names modules of a class that neither its own files nor the base's show. What a merge's kinds
of task need of an architecture is `bmm.checkpoint.architecture`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bmm.checkpoint.lora import Orientation
from bmm.errors import CheckpointError

_AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}
# A number of classes that no other size of a model equals by chance, so that a head's output layer shows.
_CLASSES = 7919


@dataclass(frozen=True, slots=True)
class Skeleton:
    """What is known of a model class before it has weights.

    Attributes:
        model_class: the class's name.
        prefix: the class's name for its encoder, empty where the model is the encoder itself.
        base_prefix: the name that a model with a head gives to this encoder.
        shapes: name in the state dict -> shape.
        orientations: module -> how its weight is stored, for modules that an adapter can change.
        outputs: names whose first size is the number of classes.
        tied: groups of names for one tensor.
    """

    model_class: str
    prefix: str
    base_prefix: str
    shapes: Mapping[str, tuple[int, ...]]
    orientations: Mapping[str, Orientation]
    outputs: frozenset[str]
    tied: tuple[tuple[str, ...], ...]


def build_skeleton(config: Mapping[str, Any], task_type: str | None, model_class: str | None) -> Skeleton:
    """Return the skeleton of the class that an adapter was trained in.

    Args:
        config: the base's `config.json`.
        task_type: PEFT's name of the task, which says the class.
        model_class: the class itself, where PEFT was not told a task.

    Raises:
        CheckpointError: transformers has no such class, or cannot build it from this configuration.
    """
    import torch
    import transformers

    values = {name: value for name, value in config.items() if name not in ("id2label", "label2id", "num_labels")}
    try:
        settings = transformers.CONFIG_MAPPING[config["model_type"]].from_dict({**values, "num_labels": _CLASSES})
        with torch.device("meta"):
            if task_type is None and model_class is not None:
                model = _named_class(model_class)(settings)
            else:
                auto = getattr(transformers, _AUTO_CLASSES[task_type or "FEATURE_EXTRACTION"])
                model = auto.from_config(settings, trust_remote_code=False)
        model.tie_weights()
    except CheckpointError:
        raise
    except Exception as error:
        # Each architecture checks its config in its own way, so any exception can mean an impossible value.
        raise CheckpointError(
            f"transformers cannot build the model of an adapter with the task_type {task_type} "
            f"({model_class or config.get('model_type')}): {' '.join(str(error).split())[:200]}"
        ) from error
    state = model.state_dict(keep_vars=True)
    prefix = model.base_model_prefix
    tied: dict[int, list[str]] = {}
    for name, tensor in state.items():
        tied.setdefault(id(tensor), []).append(name)
    return Skeleton(
        model_class=type(model).__name__,
        prefix="" if model.base_model is model else prefix,
        base_prefix=prefix,
        shapes={name: tuple(tensor.shape) for name, tensor in state.items()},
        orientations={name: found for name, module in model.named_modules() if (found := _orientation(module))},
        outputs=frozenset(name for name, tensor in state.items() if tensor.ndim and tensor.shape[0] == _CLASSES),
        tied=tuple(tuple(names) for names in tied.values() if len(names) > 1),
    )


def _named_class(name: str) -> Any:
    import transformers

    found = getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise CheckpointError(
            f"an adapter was trained in the class '{name}', which transformers does not have; save the whole model "
            "with `merge_and_unload()` and `save_pretrained`"
        )
    return found


def _orientation(module: Any) -> Orientation | None:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        return "rows"
    if isinstance(module, Conv1D | nn.Embedding):
        return "columns"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups == 1:
        return "convolution"
    return None
