"""The last layer of heads as architectures have them, against transformers alone, a row at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from family_checkpoints import config_of
from safetensors.torch import load_file
from torch import Tensor

from bmm.evaluation.head import last_layer, rows_at
from bmm.evaluation.model import Prepared, TaskModel
from bmm.kinds.text_classification import TextClassificationKind
from bmm.kinds.texts import TextRow

ROWS = [TextRow(" ".join(f"w{(7 * i + j) % 60}" for j in range(1 + i % 9)), None, i % 3) for i in range(11)]
LAYERS = {"bert": "classifier", "distilbert": "classifier", "gpt2": "score", "llama": "score", "qwen3": "score"}
Loaded = Callable[..., tuple[TaskModel, Any, Any]]


@pytest.fixture
def loaded(tmp_path: Path, tokenizer_folder: Callable[..., Path]) -> Loaded:
    """Return a function that gives a classifier as this project and as transformers alone loads it."""

    def load(family: str, side: str) -> tuple[TaskModel, Any, Any]:
        torch.manual_seed(3)
        config = config_of(family, vocab_size=100, num_labels=3, pad_token_id=0)
        alone = transformers.AutoModelForSequenceClassification.from_config(config).eval()
        for parameter in alone.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        folder = tokenizer_folder(frame=False)
        alone.save_pretrained(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side=side)
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
        tokenizer.save_pretrained(folder)
        task = TextClassificationKind().build(config.to_dict(), folder, {"max_length": 16}, 4, "reviews")
        own: dict[str, Tensor] = load_file(folder / "model.safetensors")
        start = f"{alone.base_model_prefix}."
        task.load_head({name: tensor for name, tensor in own.items() if not name.startswith(start)})
        task.load_encoder({name.removeprefix(start): t for name, t in own.items() if name.startswith(start)})
        return task, alone, tokenizer

    return load


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", LAYERS)
def test_a_head_is_read_where_it_answers(loaded: Loaded, family: str, side: str) -> None:
    task, alone, tokenizer = loaded(family, side)
    prepared: Prepared = task.prepare(ROWS)
    name = last_layer(task, prepared)
    assert name == LAYERS[family]
    inputs, answers = rows_at(task, name, prepared)
    assert inputs.shape == (len(ROWS), 16)
    wanted = []
    with torch.inference_mode():
        for index in prepared.order:
            tokens = tokenizer(ROWS[index].text, return_tensors="pt", padding=False)
            wanted.append(alone(**tokens).logits)
    torch.testing.assert_close(answers, torch.cat(wanted), rtol=1e-4, atol=1e-4)
    layer = alone.get_submodule(name)
    torch.testing.assert_close(layer(inputs), answers, rtol=1e-5, atol=1e-5)
