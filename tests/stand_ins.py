"""Pico stand-ins for what the recipes under deployments/ name on a hub: models of the same architecture, random rows.

Only names are rewritten, and amounts cut down: every other key of a recipe stays what it is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
import yaml
from images import SIDE, save_processor
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
datasets.disable_progress_bars()

ROWS = 10
WORDS = [f"w{index}" for index in range(30)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
_SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
_TEXTS = {"max_position_embeddings": 48, "eos_token_id": 3, "pad_token_id": 0}


def stand_in(recipe: Path, folder: Path, tasks: Sequence[int]) -> Path:
    """Build models and rows for some of a recipe's tasks, and return the recipe that names them instead."""
    value = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    value["experts"] = [value["experts"][index] for index in tasks]
    config = json.loads(
        (recipe.parent / "configs" / (value["base_model"].replace("/", "--") + ".json")).read_text(encoding="utf-8")
    )
    base = folder / "base"
    family = {"clip": Clip, "gpt2": Gpt2, "llama": Llama}[config["model_type"]](base, config, value["experts"])
    for number, expert in enumerate(value["experts"]):
        place = folder / "experts" / expert["name"]
        family.make_expert(place, expert, number)
        _data(folder, expert["task"], number, family)
        expert["model"] = str(place)
    value |= {
        "base_model": str(base),
        "output": str(folder / "merged"),
        "search": {**value["search"], "trials": 2},
        "evaluation": {**value["evaluation"], "compare": value["evaluation"]["compare"][:1], "bootstrap_samples": 100},
        "cluster": {**value.get("cluster", {}), "workers": 1},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(value, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


class Clip:
    """A whole CLIP model as base, and changed vision towers, saved alone as FusionBench's are."""

    def __init__(self, base: Path, config: dict[str, Any], experts: Sequence[dict[str, Any]]) -> None:
        torch.manual_seed(0)
        # As many patches a side as there is room for: 2 for patches of 32, 4 for smaller ones.
        patch = SIDE // 2 if config["vision_config"]["patch_size"] == 32 else SIDE // 4
        self._sentences = {expert["name"]: _sentences(expert["task"]) for expert in experts}
        self._tokenizer = _tokenizer([text for each in self._sentences.values() for some in each for text in some])
        self._model = transformers.CLIPModel(
            transformers.CLIPConfig(
                text_config={**_SHAPE, **_TEXTS, "vocab_size": len(self._tokenizer)},
                vision_config={**_SHAPE, "image_size": SIDE, "patch_size": patch},
                projection_dim=8,
            )
        ).eval()
        self._model.save_pretrained(base)
        save_processor(base)
        self._tokenizer.save_pretrained(base)
        self._base = base
        self._expert = ""

    def make_expert(self, folder: Path, expert: dict[str, Any], number: int) -> None:
        """Save a changed vision tower."""
        tower = transformers.CLIPVisionModel.from_pretrained(self._base).eval()
        _disturb(tower, number)
        tower.save_pretrained(folder)
        save_processor(folder)
        self._model.vision_model.load_state_dict(tower.state_dict())
        self._expert = expert["name"]

    def answers(self, images: Sequence[Image.Image]) -> list[int]:
        """Return what the last expert that was made says, so that it has something to lose."""
        processor = transformers.AutoImageProcessor.from_pretrained(self._base, backend="pil")
        sentences = self._sentences[self._expert]
        with torch.inference_mode():
            values = processor(images=list(images), return_tensors="pt")["pixel_values"]
            seen = self._model.get_image_features(pixel_values=values).pooler_output
            tokens = self._tokenizer([text for some in sentences for text in some], padding=True, return_tensors="pt")
            read = self._model.get_text_features(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            ).pooler_output
        read = torch.nn.functional.normalize(read, dim=-1).reshape(len(sentences), -1, read.shape[-1]).mean(1)
        found: list[int] = (seen @ torch.nn.functional.normalize(read, dim=-1).T).argmax(-1).tolist()
        return found


class Gpt2:
    """A decoder without a head as base, and changed sequence classifiers."""

    def __init__(self, base: Path, _config: dict[str, Any], _experts: Sequence[dict[str, Any]]) -> None:
        torch.manual_seed(0)
        self._tokenizer = _tokenizer(WORDS)
        shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 512, "vocab_size": len(self._tokenizer)}
        transformers.GPT2Model(transformers.GPT2Config(**shape, pad_token_id=0)).save_pretrained(base)
        self._tokenizer.save_pretrained(base)
        self._base = base

    def make_expert(self, folder: Path, expert: dict[str, Any], number: int) -> None:
        """Save a changed classifier with a head of its own."""
        labels = 3 if expert["name"] == "mnli" else 2
        self._model = transformers.GPT2ForSequenceClassification.from_pretrained(self._base, num_labels=labels).eval()
        _disturb(self._model.transformer, number)
        self._model.save_pretrained(folder)
        self._tokenizer.save_pretrained(folder)

    def answers(self, texts: Sequence[str], pairs: Sequence[str] | None) -> list[int]:
        """Return what the last expert that was made says, so that it has something to lose."""
        tokens = self._tokenizer(list(texts), None if pairs is None else list(pairs), padding=True, return_tensors="pt")
        inputs = {name: tokens[name] for name in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            found: list[int] = self._model(**inputs).logits.argmax(-1).tolist()
        return found


class Llama:
    """A language model as base, and changed language models."""

    def __init__(self, base: Path, config: dict[str, Any], _experts: Sequence[dict[str, Any]]) -> None:
        torch.manual_seed(0)
        self._tokenizer = _tokenizer(WORDS, framed=False)
        settings = transformers.LlamaConfig(
            **_SHAPE,
            num_key_value_heads=1,
            head_dim=8,
            vocab_size=len(self._tokenizer),
            max_position_embeddings=1024,
            eos_token_id=3,
            bos_token_id=2,
            tie_word_embeddings=config["tie_word_embeddings"],
        )
        transformers.LlamaForCausalLM(settings).save_pretrained(base)
        self._tokenizer.save_pretrained(base)
        self._base = base

    def make_expert(self, folder: Path, _expert: dict[str, Any], number: int) -> None:
        """Save a changed language model."""
        model = transformers.LlamaForCausalLM.from_pretrained(self._base)
        _disturb(model, number)
        model.save_pretrained(folder)
        self._tokenizer.save_pretrained(folder)


Family = Clip | Gpt2 | Llama


def _sentences(task: dict[str, Any]) -> list[list[str]]:
    return [[template.replace("{}", name) for template in task["templates"]] for name in task["classes"]]


def _disturb(module: torch.nn.Module, seed: int) -> None:
    """Stand in for training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def _tokenizer(texts: Sequence[str], *, framed: bool = True) -> transformers.PreTrainedTokenizerFast:
    """Return a tokenizer of whole words that knows those of some texts, and marks where a text begins and ends."""
    splitter = pre_tokenizers.Whitespace()
    words = dict.fromkeys(word for text in texts for word, _ in splitter.pre_tokenize_str(text))
    backend = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate([*SPECIAL, *words])}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = splitter
    if framed:
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", eos_token="[SEP]"
    )


def _data(folder: Path, task: dict[str, Any], seed: int, family: Family) -> None:
    """Save rows for every split that a task names, with its columns, and name them in the task."""
    generator = np.random.default_rng(seed)
    splits = [task[split] for split in ("calibration", "validation", "test")]
    path, name = splits[0]["path"], splits[0].get("name")
    place = folder / "data" / path.replace("/", "--") / (name or "default")
    tables = {split: _table(task, generator, family) for split in dict.fromkeys(split["split"] for split in splits)}
    datasets.DatasetDict(tables).save_to_disk(str(place))
    ends: dict[str, int] = {}
    for split in splits:
        assert (split["path"], split.get("name")) == (path, name)
        split["path"] = str(place)
        if "rows" in split:
            # Smaller parts of the same order, one after the other as they were.
            assert (split.get("skip", 0) > 0) == (split["split"] in ends)
            split["skip"] = ends.get(split["split"], 0)
            split["rows"] = ROWS
            ends[split["split"]] = split["skip"] + ROWS


def _table(task: dict[str, Any], generator: np.random.Generator, family: Family) -> datasets.Dataset:
    count = 3 * ROWS
    columns: dict[str, Any] = {}
    features: dict[str, Any] = {}
    for key in ("text", "text_pair", "prompt", "answer"):
        if key in task:
            columns[task[key]] = [" ".join(generator.choice(WORDS, 6)) for _ in range(count)]
            features[task[key]] = datasets.Value("string")
    if isinstance(family, Clip):
        images = [Image.fromarray(one) for one in generator.integers(0, 256, (count, 20, 20, 3), dtype=np.uint8)]
        # As data sets on a hub have it: the same classes in the same order, under other names.
        classes = [f"class {index}" for index in range(len(task["classes"]))]
        columns |= {task["image"]: images, task["label"]: family.answers(images)}
        features |= {task["image"]: datasets.Image(), task["label"]: datasets.ClassLabel(names=classes)}
    elif isinstance(family, Gpt2):
        columns[task["label"]] = family.answers(columns[task["text"]], columns.get(task.get("text_pair")))
        features[task["label"]] = datasets.ClassLabel(names=["no", "yes", "maybe"])
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))
