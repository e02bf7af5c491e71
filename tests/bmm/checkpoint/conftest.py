"""Pico models for the checkpoint tests, saved by transformers itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)
from transformers.utils import logging

logging.disable_progress_bar()

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 100,
    "max_position_embeddings": 40,
}
MODELS: dict[str, tuple[type[PreTrainedModel], type]] = {
    "classifier": (BertForSequenceClassification, BertConfig),
    "encoder": (BertModel, BertConfig),
    "masked": (BertForMaskedLM, BertConfig),
    "roberta": (RobertaForSequenceClassification, RobertaConfig),
}

Save = Callable[..., Path]
Edit = Callable[..., None]


def build(kind: str, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """Build a pico model with seeded weights."""
    model_class, config_class = MODELS[kind]
    torch.manual_seed(seed)
    return model_class(config_class(**{**SIZES, **settings}))


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Save a pico model under a name; sharded where `max_shard_size` is given."""

    def run(
        name: str,
        kind: str = "classifier",
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        max_shard_size: str | None = None,
        **settings: Any,
    ) -> Path:
        folder = tmp_path / name
        options = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
        build(kind, seed, **settings).to(dtype).save_pretrained(folder, **options)
        return folder

    return run


@pytest.fixture
def edit_weights() -> Edit:
    """Change the tensors of a single-file model: `change` gets the dictionary of tensors."""

    def run(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return run


@pytest.fixture
def edit_json() -> Edit:
    """Change a JSON file: `change` gets its value."""

    def run(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
        value = json.loads(file.read_text())
        change(value)
        file.write_text(json.dumps(value))

    return run
