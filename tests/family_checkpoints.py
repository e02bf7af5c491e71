"""Whole checkpoints of every family, as `save_pretrained` writes them, with rows and a recipe; nothing is trained."""

from __future__ import annotations

import json
import random
import string
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from architectures import CONFIGS
from tokenizers import Tokenizer, models, pre_tokenizers, processors

SPECIAL = ["[PAD]", "[BOS]", "[EOS]", "[UNK]"]
WORDS = [*string.ascii_lowercase, *"0123456789"]
ROWS = 24
SPLITS = ("calibration", "test")
LABELS = ["yes", "no"]
CLASSES = {
    "num_labels": len(LABELS),
    "id2label": dict(enumerate(LABELS)),
    "label2id": {label: index for index, label in enumerate(LABELS)},
}
EXPERTS = ("first", "second")
_BART = {
    f"{part}_{what}": size
    for part in ("encoder", "decoder")
    for what, size in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 24))
}


def _bart() -> Any:
    return transformers.BartConfig(
        **_BART, d_model=16, vocab_size=40, max_position_embeddings=24, decoder_start_token_id=2, forced_eos_token_id=2
    )


_CONFIGS = {**CONFIGS, "bart": _bart}


def save_tokenizer(folder: Path, family: str = "", side: str = "right") -> Any:
    """Write a tokenizer of words of one letter that marks a text's beginning and end, and return it."""
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    special: dict[str, Any] = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    special["padding_side"] = side
    if family == "qwen2":
        # transformers takes no other class for this one, and it knows a space by its byte.
        vocabulary = {"Ġ" if word == "9" else word: index for word, index in vocabulary.items()}
        tokenizer: Any = transformers.Qwen2Tokenizer(vocab=vocabulary, merges=[], **special)
    else:
        words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        words.post_processor = processors.TemplateProcessing(
            single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 1), ("[EOS]", 2)]
        )
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)
    tokenizer.save_pretrained(folder)
    return tokenizer


def config_of(family: str, **changes: Any) -> Any:
    """Return a family's configuration for the tokenizer here."""
    config = _CONFIGS[family]()
    values = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **changes}
    if family.startswith("t5"):
        values["decoder_start_token_id"] = 0
    for name, value in values.items():
        setattr(config, name, value)
    return config


def move(model: Any, seed: int, by: float = 0.1) -> None:
    """Change every parameter, so that none of an expert's equals the base's; tied ones together."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))


def write_recipe(folder: Path, task: dict[str, Any], **changes: Any) -> Path:
    """Write a recipe of both experts, without a search, and return its path."""
    entries = []
    for name in EXPERTS:
        splits = {split: {"path": "json", "data_files": f"data/{name}-{split}.jsonl"} for split in SPLITS}
        entries.append({"name": name, "model": f"./{name}", "task": {**task, **splits}})
    recipe = {
        "base_model": "./base",
        "experts": entries,
        "output": "./merged",
        "search": "none",
        "cluster": {"workers": 1},
        "evaluation": {"bootstrap_samples": 100, "batch_size": 8, "compare": []},
        "coverage": {"minimum": 1},
        "tracking": {"enabled": False},
        **changes,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def texts(seed: int, count: int) -> list[str]:
    """Return distinct texts of 2 to 7 words."""
    generator = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found[" ".join(generator.choice(WORDS) for _ in range(generator.randint(2, 7)))] = None
    return list(found)


def write_rows(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    """Write one expert's splits."""
    (folder / "data").mkdir(exist_ok=True)
    for place, split in enumerate(SPLITS):
        some = rows[place * ROWS : (place + 1) * ROWS]
        (folder / "data" / f"{name}-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))


def answers(model: Any, inputs: list[dict[str, Any]]) -> list[str]:
    """Return a classifier's answers to inputs that it sees one at a time."""
    with torch.inference_mode():
        return [LABELS[int(model.eval()(**one).logits.argmax())] for one in inputs]


def build_classifiers(folder: Path, config: Any, side: str = "right") -> Path:
    """Build base, two experts that classify texts, their rows and a recipe; labels are what the experts answer."""
    base = _base(folder, config, transformers.AutoModel)
    tokenizer = save_tokenizer(base, config.model_type, side)
    for seed, name in enumerate(EXPERTS, start=1):
        model = transformers.AutoModelForSequenceClassification.from_pretrained(base, **CLASSES)
        move(model, seed)
        model.save_pretrained(folder / name)
        save_tokenizer(folder / name, config.model_type, side)
        found = texts(seed, len(SPLITS) * ROWS)
        inputs = [tokenizer(text, return_tensors="pt", return_token_type_ids=False) for text in found]
        labels = answers(model, inputs)
        write_rows(folder, name, [{"text": text, "label": label} for text, label in zip(found, labels, strict=True)])
    return write_recipe(folder, {"kind": "text-classification", "max_length": 16})


def build_language_models(folder: Path, config: Any) -> Path:
    """Build base, two language models, their rows and a recipe."""
    base = _base(folder, config, transformers.AutoModelForCausalLM)
    save_tokenizer(base, config.model_type)
    for seed, name in enumerate(EXPERTS, start=1):
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        move(model, seed)
        model.save_pretrained(folder / name)
        save_tokenizer(folder / name, config.model_type)
        write_rows(folder, name, [{"text": text} for text in texts(seed, len(SPLITS) * ROWS)])
    return write_recipe(folder, {"kind": "causal-lm", "max_length": 16})


def build_seq2seq(folder: Path, config: Any) -> Path:
    """Write a base and two encoder-decoders with rows of prompts and answers, and return the recipe."""
    base = _base(folder, config, transformers.AutoModelForSeq2SeqLM)
    save_tokenizer(base)
    for seed, name in enumerate(EXPERTS, 1):
        model = transformers.AutoModelForSeq2SeqLM.from_pretrained(base)
        move(model, seed)
        model.save_pretrained(folder / name)
        save_tokenizer(folder / name)
        said = texts(seed, 2 * len(SPLITS) * ROWS)
        write_rows(
            folder, name, [{"prompt": one, "answer": two} for one, two in zip(said[::2], said[1::2], strict=True)]
        )
    return write_recipe(folder, {"kind": "seq2seq-lm", "max_length": 16, "max_answer_length": 12})


def _base(folder: Path, config: Any, auto_class: Any) -> Path:
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    model = auto_class.from_config(config)
    move(model, 0, by=0.25)
    model.save_pretrained(folder / "base")
    return folder / "base"
