"""Whole merges of adapters: of texts beside a full expert, and of images."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from images import build_images
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

import bmm
from bmm.recipe import Recipe

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def make_adapter(folder: Path, name: str, **settings: Any) -> Path:
    """Put an adapter, trained for a moment, in the place of a full expert."""
    place = folder / "experts" / name
    rows = [json.loads(line) for line in (folder / "data" / name / "calibration.jsonl").read_text().splitlines()]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    shutil.rmtree(place)
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=2)
    options = {"task_type": "SEQ_CLS", "r": 4, "target_modules": ["query", "value", "dense"], **settings}
    model = get_peft_model(model, LoraConfig(**options))
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for start in [*range(0, len(rows), 16)] * 3:
        batch = rows[start : start + 16]
        inputs = tokenizer([row["text"] for row in batch], padding=True, return_tensors="pt")
        labels = torch.tensor([["yes", "no"].index(row["label"]) for row in batch])
        inputs.pop("token_type_ids", None)
        model(**inputs, labels=labels).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    model.save_pretrained(place)
    # PEFT stores no names of classes, and the rows of these tasks have names.
    names = {"0": "yes", "1": "no"}
    config = {**json.loads((folder / "base" / "config.json").read_text()), "id2label": names}
    (place / "config.json").write_text(json.dumps({**config, "label2id": {"yes": 0, "no": 1}}))
    return place


def materialise(folder: Path, name: str) -> None:
    """Put the full model in the place of an adapter, as PEFT and transformers write it."""
    place = folder / "experts" / name
    config = json.loads((place / "config.json").read_text())
    model = AutoModelForSequenceClassification.from_pretrained(
        folder / "base", num_labels=2, id2label={0: "yes", 1: "no"}, label2id={"yes": 0, "no": 1}
    )
    merged = PeftModel.from_pretrained(model, place).merge_and_unload()
    shutil.rmtree(place)
    merged.save_pretrained(place)
    for file in (folder / "base").glob("tokenizer*"):
        shutil.copy(file, place)
    assert config["id2label"] == {"0": "yes", "1": "no"}


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model.safetensors")


def test_adapters_merge_as_the_models_that_they_stand_for(
    pico: Path, in_process: None, edit_recipe: Callable[..., Path]
) -> None:
    path = edit_recipe(pico, search={"trials": 2, "per": "model"}, evaluation={"compare": ["average"]})
    first = make_adapter(pico, "task0")
    make_adapter(pico, "task1", use_dora=True, use_rslora=True)
    before = sum(file.stat().st_size for file in first.iterdir())
    merged = bmm.merge(Recipe.from_yaml(path), store=pico / "store")
    document = json.loads((merged.output / "merge.json").read_text())
    found = weights(merged.output)
    heads = load_file(merged.output / "heads" / "task1.safetensors")
    assert sum(file.stat().st_size for file in first.iterdir()) == before
    assert document["notes"] == [] or all("adapter" not in note for note in document["notes"])
    treated = {entry["parameter"]: entry["treatment"] for entry in document["coverage"]}
    assert treated["encoder.layer.0.attention.self.query.weight"] in ("regressed", "anchored")

    for name in ("task0", "task1"):
        materialise(pico, name)
    again = bmm.merge(Recipe.from_yaml(path), store=pico / "another")
    wanted = weights(again.output)
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-5)
    theirs = load_file(again.output / "heads" / "task1.safetensors")
    assert heads.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(heads[name], theirs[name], rtol=1e-5, atol=1e-6)
    compared = json.loads((again.output / "merge.json").read_text())
    for task in ("task0", "task1", "task2"):
        assert document["metrics"]["test"][task]["expert"] == compared["metrics"]["test"][task]["expert"]
        assert document["metrics"]["test"][task]["merged"] == compared["metrics"]["test"][task]["merged"]


@pytest.mark.parametrize(("family", "dora"), [("vit", False), ("dinov2", True)])
def test_adapters_of_image_classifiers_merge_as_the_models_that_they_stand_for(
    tmp_path: Path, family: str, dora: bool, in_process: None, edit_recipe: Callable[..., Path]
) -> None:
    build_images(tmp_path, family, trained=False)
    path = edit_recipe(tmp_path, search="none", regression={"mode": "propagated"}, evaluation={"compare": []})
    whole = {}
    for seed, name in enumerate(("task0", "task1")):
        model = AutoModelForImageClassification.from_pretrained(
            tmp_path / "base", num_labels=2, id2label={0: "dark", 1: "light"}, label2id={"dark": 0, "light": 1}
        )
        linear = {place for place, part in model.base_model.named_modules() if isinstance(part, torch.nn.Linear)}
        wanted = sorted({place.rpartition(".")[2] for place in linear})
        torch.manual_seed(seed)
        # PEFT knows no task of images, and keeps the class instead.
        adapted = get_peft_model(
            model, LoraConfig(r=2, target_modules=wanted, modules_to_save=["classifier"], use_dora=dora)
        )
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn(parameter.shape))
        place = tmp_path / "experts" / name
        adapted.save_pretrained(place)
        model.config.save_pretrained(place)
        whole[name] = adapted.merge_and_unload()
    first = bmm.merge(Recipe.from_yaml(path), store=tmp_path / "store")
    found, measured = weights(first.output), first.document["metrics"]
    maps = [entry["parameter"] for entry in first.document["coverage"] if entry["treatment"] == "regressed"]
    # Query, key, value and output of two layers, two maps of each MLP.
    assert sum(name.endswith(".weight") and ".layer" in f".{name}" for name in maps) == 12
    origin = weights(tmp_path / "base")
    assert sum(not torch.equal(found[name], origin[name]) for name in found) >= 12
    for name, model in whole.items():
        shutil.rmtree(tmp_path / "experts" / name)
        model.save_pretrained(tmp_path / "experts" / name)
    again = bmm.merge(Recipe.from_yaml(path), store=tmp_path / "another")
    for name, wanted_weight in weights(again.output).items():
        torch.testing.assert_close(found[name], wanted_weight, rtol=1e-4, atol=1e-5)
    assert measured["test"] == again.document["metrics"]["test"]
