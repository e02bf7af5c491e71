"""CLIP: the vision tower merged, heads from the base's frozen text tower, against transformers' own CLIPModel."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from images import build_clip
from PIL import Image
from safetensors.torch import load_file

import bmm
from bmm.checkpoint.reader import Checkpoint
from bmm.errors import CheckpointError, DataError, RecipeError
from bmm.kinds.settings import SplitSource, ZeroShotImageClassification
from bmm.kinds.zero_shot_image_classification import ZeroShotImageClassificationKind
from bmm.pipeline import perform_here, run_stages
from bmm.report.card import FOLDER_PLACEHOLDER
from bmm.sources import fingerprint_inputs
from bmm.store import Store

KIND = ZeroShotImageClassificationKind()


def task_of(**values: Any) -> ZeroShotImageClassification:
    unused = SplitSource(path="json", data_files="unused.jsonl")
    said = {"kind": KIND.name, "classes": ["dark", "light"], "calibration": unused, "validation": unused}
    return ZeroShotImageClassification.model_validate({**said, "test": unused, **values})


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    build_clip(folder)
    return folder


def reference(folder: Path, images: list[Path]) -> list[int]:
    """Return what transformers' own CLIPModel answers, with one sentence a class."""
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    texts = tokenizer(["it is a dark", "it is a light"], return_tensors="pt")
    values = processor(images=[Image.open(path) for path in images], return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        found = model(input_ids=texts["input_ids"], attention_mask=texts["attention_mask"], pixel_values=values)
    answers: list[int] = found.logits_per_image.argmax(-1).tolist()
    return answers


def test_a_head_is_the_normalised_mean_over_the_templates(clip: Path) -> None:
    with Checkpoint.open(clip / "base") as base:
        head = KIND.make_head(base, task_of(templates=["a photo of a {}", "it is a {} picture"]), "pets")
        assert head is not None
    model = transformers.CLIPModel.from_pretrained(clip / "base").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(clip / "base")
    for index, name in enumerate(["dark", "light"]):
        each = []
        for sentence in (f"a photo of a {name}", f"it is a {name} picture"):
            with torch.inference_mode():
                pooled = model.text_model(**tokenizer(sentence, return_tensors="pt")).pooler_output
                each.append(model.text_projection(pooled)[0])
        mean = sum(vector / vector.norm() for vector in each) / 2
        torch.testing.assert_close(head["class_embeddings"][index], mean / mean.norm(), atol=1e-5, rtol=1e-5)
    assert torch.equal(head["logit_scale"], model.logit_scale)
    assert torch.equal(head["visual_projection.weight"], model.visual_projection.weight)


@pytest.mark.slow
def test_a_merge_of_vision_towers_is_a_clip_model(clip: Path, in_process: None, edit_recipe: Any) -> None:
    recipe = bmm.Recipe.from_yaml(clip / "recipe.yaml").document()
    for expert in recipe["experts"]:
        expert["task"]["templates"] = ["it is a {}"]
    recipe["regression"]["mode"] = "propagated"
    merge = bmm.merge(bmm.Recipe.from_yaml(edit_recipe(clip, **recipe)), store=clip / "store")
    base, merged = (load_file(folder / "model.safetensors") for folder in (clip / "base", merge.output))
    assert merged.keys() == base.keys()
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed
    assert all(name.startswith("vision_model.") for name in changed)
    (code,) = re.findall(r"```python\n(.*?)```", (merge.output / "README.md").read_text(), flags=re.DOTALL)
    for task in ("task0", "task1"):
        images = sorted((clip / "data" / task / "test").rglob("*.png"))
        true = [["dark", "light"].index(path.parent.name) for path in images]
        right = [found == label for found, label in zip(reference(merge.output, images), true, strict=True)]
        measured = merge.document["metrics"]["test"][task]
        assert measured["merged"] == pytest.approx(sum(right) / len(right))
        assert measured["expert"] > 0.9
        names: dict[str, Any] = {}
        exec(code.replace(FOLDER_PLACEHOLDER, str(merge.output)).replace("'task0'", repr(task)), names)  # noqa: S102
        assert names["label"] in ("dark", "light")
    assert [expert["labels"] for expert in merge.document["experts"]] == [["dark", "light"]] * 2


def test_the_information_of_an_expert_is_that_of_its_classes(clip: Path, tmp_path: Path) -> None:
    recipe = bmm.Recipe.from_yaml(clip / "recipe.yaml").document()
    recipe |= {"anchor": {"method": "fisher"}}
    digests = []
    # Other words for the same classes: the rows stay as they are.
    for classes in (["dark", "light"], ["it", "is"]):
        for expert in recipe["experts"]:
            expert["task"]["classes"] = classes
        read = bmm.Recipe.from_mapping(recipe, folder=clip)
        inputs = fingerprint_inputs(read, check_output_folder=False)
        results = run_stages(read, inputs, Store.open(tmp_path / "store"), perform_here, ("experts", "anchor"))
        digests.append(results["anchor"].reference("anchor").digest)
    assert digests[0] != digests[1]


def test_mistakes_are_one_sentence(clip: Path, tmp_path: Path) -> None:
    with (
        Checkpoint.open(clip / "experts" / "task1") as tower,
        pytest.raises(CheckpointError, match="a whole CLIP model"),
    ):
        KIND.make_head(tower, task_of(), "pets")
    with Checkpoint.open(clip / "base") as base, pytest.raises(DataError, match="longer than the 12 tokens"):
        KIND.make_head(base, task_of(templates=["a photo " * 8 + "{}"]), "pets")
    wide = tmp_path / "wide"
    shutil.copytree(clip / "base", wide)
    config = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps({**config, "projection_dim": config["projection_dim"] * 2}))
    with (
        Checkpoint.open(wide) as base,
        pytest.raises(CheckpointError, match=r"wide has tensors of other shapes .*text_proj"),
    ):
        KIND.make_head(base, task_of(), "pets")
    recipe = bmm.Recipe.from_yaml(clip / "recipe.yaml").document()
    recipe["experts"][0]["task"]["templates"] = ["a photo"]
    with pytest.raises(RecipeError, match=r"'experts\.0\.task\.templates': the template 'a photo' has no {}"):
        bmm.Recipe.from_mapping(recipe)
    recipe["experts"][0]["task"] |= {"templates": ["{}"], "classes": ["dark", "dark"]}
    with pytest.raises(RecipeError, match=r"'experts\.0\.task\.classes': a class is named twice"):
        bmm.Recipe.from_mapping(recipe)
