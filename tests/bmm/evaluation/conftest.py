"""Pico classifiers and their tokenizers, built in a temporary folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = [f"w{i}" for i in range(60)]
PADDING, UNKNOWN = "[PAD]", "[UNK]"
SPECIAL = [PADDING, UNKNOWN, "[CLS]", "[SEP]"]


def save_tokenizer(folder: Path, words: list[str] = WORDS, *, pad: bool = True, frame: bool = True) -> Path:
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if frame:
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
    extra = {}
    if pad:
        # What sentence encoders ship: a tokenizer.json that pads every row to a fixed length by itself.
        backend.enable_padding(length=40, pad_token=PADDING)
        extra = {"pad_token": PADDING}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token=UNKNOWN, model_input_names=inputs, **extra
    ).save_pretrained(folder)
    return folder


def save_pico(folder: Path, family: str, seed: int = 0, **options: object) -> Path:
    shape = {"vocab_size": 100, "num_labels": 3, "max_position_embeddings": 48, **options}
    heads = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(seed)
    match family:
        case "bert":
            model = transformers.BertForSequenceClassification(transformers.BertConfig(**heads, **shape))
        case "roberta":
            config = transformers.RobertaConfig(**heads, **shape, type_vocab_size=1, pad_token_id=0)
            model = transformers.RobertaForSequenceClassification(config)
        case _:
            config = transformers.DistilBertConfig(n_layers=2, dim=16, n_heads=2, hidden_dim=32, **shape)
            model = transformers.DistilBertForSequenceClassification(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return save_tokenizer(folder)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Keep pico models off thread pools, which cost them far more than they save."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def pico(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that saves a pico classifier of a family and returns its folder."""

    def save(family: str = "bert", seed: int = 0, **options: object) -> Path:
        folder = tmp_path / f"{family}-{seed}-{len(list(tmp_path.iterdir()))}"
        return save_pico(folder, family, seed, **options)

    return save


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that saves a tokenizer and returns its folder."""

    def save(**options: bool) -> Path:
        return save_tokenizer(tmp_path / f"tokenizer-{len(list(tmp_path.iterdir()))}", **options)

    return save
