"""What `bmm init` finds: texts, images and adapters, by what lies in the folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from sounds import CONFIGS
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from bmm.errors import UserError
from bmm.publication import rewrite_report
from bmm.recipe import Recipe
from bmm.starter import write_recipe


def test_text_classifiers_get_a_recipe_that_is_complete(pico: Path) -> None:
    (pico / "recipe.yaml").unlink()
    found = write_recipe(pico)
    assert found["to_complete"] == []
    recipe = Recipe.from_yaml(pico / "recipe.yaml")
    assert [expert.name for expert in recipe.experts] == found["experts"]
    assert {expert.task.kind for expert in recipe.experts if expert.task} == {"text-classification"}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = ViTConfig(**shape, image_size=8, patch_size=4, num_labels=3)
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "base")
    for name in ("birds", "fish"):
        ViTForImageClassification(config).save_pretrained(tmp_path / "experts" / name)
        for split in ("calibration", "validation", "test"):
            path = tmp_path / "data" / name / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"picture": f"{split}.png", "category": "LABEL_1"}) + "\n")
    return tmp_path


def test_image_classifiers_are_found_with_their_columns(images: Path) -> None:
    found = write_recipe(images)
    assert found["to_complete"] == []
    recipe = Recipe.from_yaml(images / "recipe.yaml")
    assert [expert.name for expert in recipe.experts] == ["birds", "fish"]
    for expert in recipe.experts:
        assert expert.task is not None
        said = expert.task.model_dump()
        assert (said["kind"], said["image"], said["label"]) == ("image-classification", "picture", "category")


def test_classifiers_of_sounds_are_found_whatever_their_class_is_called(tmp_path: Path) -> None:
    transformers.Wav2Vec2Model(CONFIGS["wav2vec2"]()).save_pretrained(tmp_path / "base")
    for name in ("birds", "engines"):
        transformers.AutoModelForAudioClassification.from_config(CONFIGS["wav2vec2"]()).save_pretrained(tmp_path / name)
        for split in ("calibration", "validation", "test"):
            path = tmp_path / "data" / name / f"{split}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"recording,label\n{split}.wav,LABEL_1\n")
    found = write_recipe(tmp_path)
    assert found["to_complete"] == []
    for expert in Recipe.from_yaml(tmp_path / "recipe.yaml").experts:
        assert expert.task is not None
        said = expert.task.model_dump()
        assert (said["kind"], said["audio"], said["max_seconds"]) == ("audio-classification", "recording", 30)


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        (
            {"task_type": None, "auto_mapping": {"base_model_class": "ViTForImageClassification"}},
            "image-classification",
        ),
        ({"task_type": None, "auto_mapping": {"base_model_class": "ViTModel"}}, "text-classification"),
        ({"task_type": "SEQ_CLS", "auto_mapping": None}, "text-classification"),
    ],
)
def test_an_adapters_kind_is_that_of_the_class_it_was_trained_in(images: Path, said: dict[str, Any], kind: str) -> None:
    for file in (images / "experts" / "fish").iterdir():
        file.unlink()
    (images / "experts" / "fish" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **said}))
    write_recipe(images)
    text = (images / "recipe.yaml").read_text()
    assert f"kind: {kind}" in text[text.index("experts/fish") :].split("label:")[0]


def test_an_adapter_is_an_expert_and_what_lies_beside_it_is_its_own(pico: Path) -> None:
    (pico / "recipe.yaml").unlink()
    experts = sorted((pico / "experts").iterdir())
    for file in experts[0].glob("*.safetensors"):
        file.unlink()
    (experts[0] / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "task_type": "SEQ_CLS"}))
    found = write_recipe(pico)
    assert found["experts"] == [path.name for path in experts]
    assert "an adapter of the base" in (pico / "recipe.yaml").read_text()


def test_every_name_is_one_that_a_recipe_takes(images: Path) -> None:
    for folder, name in (("experts", "mean"), ("experts", "über uns"), ("more", "birds"), ("more", "x" * 80)):
        (images / folder).mkdir(exist_ok=True)
        shutil.copytree(images / "experts" / "fish", images / folder / name)
    found = write_recipe(images)
    recipe = Recipe.from_yaml(images / "recipe.yaml")
    assert [expert.name for expert in recipe.experts] == found["experts"]
    assert set(found["experts"]) == {"birds", "birds-2", "fish", "mean-2", "ber-uns", "x" * 60}


def test_an_expert_of_another_kind_is_no_base(images: Path) -> None:
    (images / "base").rename(images / "start")
    config = json.loads((images / "start" / "config.json").read_text())
    for name in ("alone", "words"):
        shutil.copytree(images / "start", images / name)
        (images / name / "config.json").write_text(
            json.dumps({**config, "architectures": ["BertForTokenClassification"]})
        )
    assert write_recipe(images)["base"] == "./start"


def test_a_folder_outside_of_the_allowed_ones_is_left_alone(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BMM_ALLOWED_FOLDERS", str(images / "experts"))
    with pytest.raises(UserError, match=r"the folder of experts: .* lies outside of the allowed folders"):
        write_recipe(images)
    (images / "merge.json").write_text('{"schema": 1}')
    with pytest.raises(UserError, match=r"the output folder: .* lies outside of the allowed folders"):
        rewrite_report(images, {})
    assert not (images / "report.html").exists()


def test_a_folder_without_experts_is_refused(images: Path) -> None:
    shutil.rmtree(images / "experts" / "fish")
    with pytest.raises(UserError, match="holds 1 classifiers of texts, images or sounds"):
        write_recipe(images)
