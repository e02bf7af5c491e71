from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from sounds import CONFIGS
from transformers import BertConfig, ViTConfig, Wav2Vec2BertConfig

from bmm.kinds.registry import kind_of
from bmm.kinds.settings import Task, counts_right_rows

SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}


@pytest.mark.parametrize(
    ("said", "counted"),
    [
        ({"kind": "text-classification"}, True),
        ({"kind": "text-classification", "metric": "matthews"}, False),
        ({"kind": "image-classification"}, True),
        ({"kind": "audio-classification"}, True),
        ({"kind": "zero-shot-image-classification", "classes": ["a", "b"]}, True),
        ({"kind": "token-classification", "metric": "accuracy"}, False),
        ({"kind": "causal-lm"}, False),
    ],
)
def test_where_right_rows_are_counted_answers_are_scores_of_classes(said: dict[str, Any], counted: bool) -> None:
    task: Task = TypeAdapter(Task).validate_python(said)
    assert counts_right_rows(task) is counted
    assert not counts_right_rows(None)
    assert kind_of(task.kind).classes or not counted


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("text-classification", BertConfig(**SMALL, vocab_size=11)),
        ("image-classification", ViTConfig(**SMALL, image_size=8, patch_size=4, num_channels=1)),
        *(("audio-classification", make()) for make in CONFIGS.values()),
        ("audio-classification", Wav2Vec2BertConfig(**SMALL, conformer_conv_dropout=0.0)),
    ],
)
def test_a_model_that_reads_no_rows_can_be_fed(kind: str, config: Any) -> None:
    model = kind_of(kind).bare(config.to_dict(), "one")
    assert model.reader is None
    for parameter in model.encoder.parameters():
        torch.nn.init.zeros_(parameter)
    with torch.inference_mode():
        answers = model.encoder(**kind_of(kind).probe(model))
    assert answers.last_hidden_state.shape[0] == 2
