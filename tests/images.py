"""Pico image experts for tests of whole merges: real checkpoints and real PNG files, made in a temporary folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import yaml
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers.utils import logging

logging.disable_progress_bar()

SIDE = 16
COUNTS = {"training": 96, "calibration": 24, "validation": 30, "test": 30}
SHAPE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": SIDE,
    "patch_size": 4,
}
FAMILIES = {
    "vit": (transformers.ViTConfig, transformers.ViTModel),
    "dinov2": (transformers.Dinov2Config, transformers.Dinov2Model),
}


def save_processor(folder: Path, side: int = SIDE) -> None:
    """Write the file that says how images become pixel values."""
    value = {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": side},
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.25, 0.25, 0.25],
        "resample": 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(value), encoding="utf-8")


def picture(task: int, label: int, generator: np.random.Generator, side: int = 32) -> NDArray[np.uint8]:
    """Return noise, `(side, side, 3)`, that is brighter in one half if the label is 1; which half is the task's."""
    pixels = generator.integers(0, 160, (side, side, 3))
    half = [np.s_[: side // 2], np.s_[:, : side // 2], np.s_[side // 2 :]][task % 3]
    pixels[half] += 90 * label
    return pixels.astype(np.uint8)


def build_images(folder: Path, family: str, *, experts: int = 2, trained: bool = True) -> Path:
    """Build base, experts, folders of PNG files and a recipe; return the recipe's path."""
    config_class, model_class = FAMILIES[family]
    torch.manual_seed(0)
    model_class(config_class(**SHAPE)).save_pretrained(folder / "base")
    save_processor(folder / "base")
    entries = []
    for index in range(experts):
        name = f"task{index}"
        generator = np.random.default_rng(index)
        kept: list[tuple[NDArray[np.uint8], int]] = []
        for split, count in COUNTS.items():
            for number in range(count):
                pixels = picture(index, number % 2, generator)
                if split == "training":
                    kept.append((pixels, number % 2))
                    continue
                place = folder / "data" / name / split / ["dark", "light"][number % 2]
                place.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(place / f"{number}.png")
        if trained:
            train_images(folder / "base", folder / "experts" / name, kept, seed=index)
        splits: dict[str, Any] = {
            split: {"path": "imagefolder", "data_files": f"data/{name}/{split}"}
            for split in ("calibration", "validation", "test")
        }
        task = {"kind": "image-classification", **splits}
        entries.append({"name": name, "model": f"./experts/{name}", "task": task})
    recipe = {
        "base_model": "./base",
        "experts": entries,
        "output": "./merged",
        "grams": {"shard_rows": 12},
        "regression": {"mode": "module-wise"},
        "search": {"per": "model", "trials": 3},
        "cluster": {"workers": 1},
        "evaluation": {"bootstrap_samples": 200, "compare": ["average"]},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return folder / "recipe.yaml"


TEXTS = {"vocab_size": 40, "num_hidden_layers": 1, "max_position_embeddings": 12, "eos_token_id": 3, "pad_token_id": 0}


def build_clip(folder: Path) -> Path:
    """Build a CLIP base, two vision experts (one a whole CLIP model, one the tower alone), data and a recipe."""
    path = build_images(folder, "vit", trained=False)
    torch.manual_seed(1)
    inner = {name: value for name, value in SHAPE.items() if name not in ("image_size", "patch_size")}
    config = transformers.CLIPConfig(text_config={**inner, **TEXTS}, vision_config=SHAPE, projection_dim=8)
    shutil.rmtree(folder / "base")
    transformers.CLIPModel(config).save_pretrained(folder / "base")
    save_processor(folder / "base")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "photo", "of", "dark", "light", "picture", "is", "it"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", eos_token="[SEP]"
    ).save_pretrained(folder / "base")
    for index in range(2):
        train_clip(folder / "base", folder / "experts" / f"task{index}", index)
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    for expert in recipe["experts"]:
        expert["task"] |= {
            "kind": "zero-shot-image-classification",
            "classes": ["dark", "light"],
            "templates": ["a photo of a {}", "it is a {} picture"],
        }
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def train_clip(base: Path, target: Path, index: int) -> None:
    """Fine-tune the vision tower for a moment, and save the whole model or, for odd experts, the tower alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(index)
    model = transformers.CLIPModel.from_pretrained(base)
    texts = transformers.AutoTokenizer.from_pretrained(base)(
        ["a photo of a dark", "a photo of a light"], return_tensors="pt"
    )
    processor = transformers.AutoImageProcessor.from_pretrained(base, backend="pil")
    generator = np.random.default_rng(100 + index)
    rows = [(picture(index, number % 2, generator), number % 2) for number in range(96)]
    optimiser = torch.optim.AdamW(model.vision_model.parameters(), lr=3e-3)
    for start in [*range(0, 96, 16)] * 6:
        some = rows[start : start + 16]
        values = processor(images=[Image.fromarray(pixels) for pixels, _ in some], return_tensors="pt")["pixel_values"]
        logits = model(
            input_ids=texts["input_ids"], attention_mask=texts["attention_mask"], pixel_values=values
        ).logits_per_image
        torch.nn.functional.cross_entropy(logits, torch.tensor([label for _, label in some])).backward()
        optimiser.step()
        optimiser.zero_grad()
    if index % 2:
        model.vision_model.save_pretrained(target)
    else:
        model.save_pretrained(target)
        save_processor(target)
    torch.set_num_threads(threads)


def train_images(base: Path, target: Path, rows: list[tuple[NDArray[np.uint8], int]], seed: int) -> None:
    """Fine-tune an ordinary image classifier for a moment."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = transformers.AutoModelForImageClassification.from_pretrained(
        base, num_labels=2, id2label={0: "dark", 1: "light"}, label2id={"dark": 0, "light": 1}
    )
    processor = transformers.AutoImageProcessor.from_pretrained(base, backend="pil")
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for start in [*range(0, len(rows), 16)] * 6:
        some = rows[start : start + 16]
        values = processor(images=[Image.fromarray(pixels) for pixels, _ in some], return_tensors="pt")["pixel_values"]
        model(pixel_values=values, labels=torch.tensor([label for _, label in some])).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    model.save_pretrained(target)
    save_processor(target)
    torch.set_num_threads(threads)
