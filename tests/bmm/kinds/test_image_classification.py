"""Whole merges of image classifiers, against what transformers itself makes of the output."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from images import build_images
from PIL import Image
from safetensors.torch import load_file

import bmm
from bmm.errors import CheckpointError
from bmm.report.card import FOLDER_PLACEHOLDER
from bmm.sources import fingerprint_inputs


def loaded(code: str, output: Path, task: str) -> Any:
    """Run a card's own code and return the classifier that it makes."""
    names: dict[str, Any] = {}
    exec(code.replace(FOLDER_PLACEHOLDER, str(output)).replace("'task0'", repr(task)), names)  # noqa: S102
    return names["model"].eval()


@pytest.mark.slow
@pytest.mark.parametrize(("family", "mode"), [("vit", "module-wise"), ("dinov2", "propagated")])
def test_a_merge_of_image_experts_is_what_transformers_loads(
    tmp_path: Path, family: str, mode: str, in_process: None, edit_recipe: Any
) -> None:
    build_images(tmp_path, family)
    recipe = bmm.Recipe.from_yaml(edit_recipe(tmp_path, regression={"mode": mode}))
    merge = bmm.merge(recipe, store=tmp_path / "store")
    processor = transformers.AutoImageProcessor.from_pretrained(merge.output, backend="pil")
    (code,) = re.findall(r"```python\n(.*?)```", (merge.output / "README.md").read_text(), flags=re.DOTALL)
    for task in ("task0", "task1"):
        model = loaded(code, merge.output, task)
        right = []
        for path in sorted((tmp_path / "data" / task / "test").rglob("*.png")):
            values = processor(images=Image.open(path), return_tensors="pt")["pixel_values"]
            with torch.inference_mode():
                answer = model.config.id2label[int(model(pixel_values=values).logits.argmax())]
            right.append(answer == path.parent.name)
        measured = merge.document["metrics"]["test"][task]
        assert measured["merged"] == pytest.approx(sum(right) / len(right))
        assert measured["metric"] == "accuracy"
        assert measured["expert"] > 0.9
    encoder = transformers.AutoModel.from_pretrained(merge.output)
    assert type(encoder).__name__ == {"vit": "ViTModel", "dinov2": "Dinov2Model"}[family]
    assert (
        load_file(merge.output / "model.safetensors").keys()
        == load_file(tmp_path / "base" / "model.safetensors").keys()
    )
    assert sum(entry["module"] is not None for entry in merge.document["coverage"]) >= 12
    assert bmm.merge(recipe, store=tmp_path / "store").results["publish"].state == "cached"


def test_the_name_of_an_image_folder_is_part_of_the_rows(tmp_path: Path) -> None:
    build_images(tmp_path, "vit")
    recipe = bmm.Recipe.from_yaml(tmp_path / "recipe.yaml")
    before = fingerprint_inputs(recipe).experts[0].data
    (tmp_path / "data" / "task0" / "test" / "dark").rename(tmp_path / "data" / "task0" / "test" / "gloomy")
    after = fingerprint_inputs(recipe).experts[0].data
    assert before["test"] != after["test"]
    assert before["validation"] == after["validation"]


def test_a_text_and_an_image_expert_do_not_fit_together(tmp_path: Path, in_process: None, edit_recipe: Any) -> None:
    build_images(tmp_path, "vit")
    recipe = bmm.Recipe.from_yaml(tmp_path / "recipe.yaml").document()
    experts = recipe["experts"]
    text = {"path": "text", "data_files": "recipe.yaml"}
    experts[1]["task"] = {"calibration": text, "validation": text, "test": text}
    with pytest.raises(CheckpointError, match="transformers has no text classifier for the model type 'vit'"):
        bmm.merge(bmm.Recipe.from_yaml(edit_recipe(tmp_path, experts=experts)), store=tmp_path / "store")
