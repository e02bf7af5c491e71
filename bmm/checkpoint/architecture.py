"""What transformers says of an architecture: the encoder's prefix, and the parameters its classifier needs.

Everything comes from `config.json` and transformers' own classes; models are built on torch's meta device at
most, so no weight is ever allocated. No comparison of checkpoints here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bmm.errors import CheckpointError

if TYPE_CHECKING:
    from bmm.checkpoint.reader import Checkpoint


def encoder_prefix(config: dict[str, Any]) -> str:
    """Return the name under which the sequence classifier keeps its encoder ("bert", "roberta").

    Raises:
        CheckpointError: the config names no model type, or one without a sequence classifier.
    """
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError("config.json has no 'model_type'; save the model again with `save_pretrained`")
    if model_type not in CONFIG_MAPPING:
        raise CheckpointError(f"the model type '{model_type}' in config.json is not one that transformers has")
    config_class = CONFIG_MAPPING[model_type]
    if config_class not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise CheckpointError(f"transformers has no text classifier for the model type '{model_type}' in config.json")
    model_class = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[config_class]
    if isinstance(model_class, tuple):
        model_class = model_class[0]
    return str(model_class.base_model_prefix)


def encoder_names(checkpoint: Checkpoint, prefix: str) -> dict[str, str]:
    """Return canonical name -> stored name of the encoder's tensors.

    A checkpoint without a single name under the prefix is a bare encoder: all tensors are the encoder's.
    """
    names = checkpoint.names()
    under = {name.removeprefix(f"{prefix}."): name for name in names if name.startswith(f"{prefix}.")}
    return under or {name: name for name in names}


def missing_parameters(checkpoint: Checkpoint) -> list[str]:
    """Return the parameters that the sequence classifier needs and the checkpoint lacks, sorted.

    Of parameters which are tied to each other one is enough. Buffers do not count: they are made, not learnt.

    Raises:
        CheckpointError: the config does not describe a model that transformers can build.
    """
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForSequenceClassification

    prefix = encoder_prefix(checkpoint.config)
    try:
        config = CONFIG_MAPPING[checkpoint.config["model_type"]].from_dict(checkpoint.config)
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    except Exception as error:
        # Each architecture checks its config in its own way, so any exception can mean an impossible value.
        raise CheckpointError(
            f"{checkpoint.path / 'config.json'} does not describe a model: {' '.join(str(error).split())}"
        ) from error
    encoder = encoder_names(checkpoint, prefix)
    present = {f"{prefix}.{name}" for name in encoder} | (set(checkpoint.names()) - set(encoder.values()))
    tied: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
    return sorted(names[0] for names in tied.values() if present.isdisjoint(names))
