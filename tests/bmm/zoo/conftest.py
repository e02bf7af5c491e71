"""Pico base checkpoints, one with a tokenizer and one with an image processor, for the tests of the zoo."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, Dinov2Config, Dinov2Model, PreTrainedTokenizerFast

from bmm.zoo.dinov2 import preprocessor

WORDS = ("red", "blue", "warm", "cold", "sea", "sun", "one", "two", "three", "four", "five", "six")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Pico models gain nothing from threads, and lose much where other work fills the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def pico_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pico") / "base"
    vocabulary = {word: index for index, word in enumerate(("[PAD]", "[UNK]", *WORDS))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = BertConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            vocab_size=len(vocabulary),
        )
        BertModel(config).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return folder


@pytest.fixture(scope="session")
def pico_vision_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Dinov2 encoder for pictures of 8 × 8 pixels in 4 patches."""
    folder = tmp_path_factory.mktemp("pico-vision") / "base"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Dinov2Config(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            mlp_ratio=2,
            image_size=16,
            patch_size=4,
            use_mask_token=False,
        )
        Dinov2Model(config).save_pretrained(folder)
    document = {**preprocessor(), "size": {"height": 8, "width": 8}}
    (folder / "preprocessor_config.json").write_text(json.dumps(document))
    return folder
