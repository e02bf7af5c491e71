"""Real training of a pico model: what is written, what is reused, what trains again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from bmm.digest import digest_file
from bmm.errors import OutputError
from bmm.zoo import experts
from bmm.zoo.experts import train_expert
from bmm.zoo.learners import ImageTraining, TextTraining
from bmm.zoo.pictures import Picture
from bmm.zoo.sets import Row
from bmm.zoo.splits import TaskRows
from bmm.zoo.training import TrainingError

FEW = TextTraining(steps=30, batch_size=4, max_length=8, learning_rate=5e-3, warmup_steps=3)


def make_rows() -> TaskRows:
    numbers = ("one", "two", "three", "four", "five", "six")
    rows: list[Row] = [
        (f"{word} {a} {b}", kind) for a in numbers for b in numbers for word, kind in (("red", "R"), ("blue", "B"))
    ]
    return TaskRows(("B", "R"), rows[:40], rows[40:50], rows[50:60], rows[60:])


def share_right(model: Any, tokenizer: Any, rows: list[Row]) -> float:
    with torch.inference_mode():
        scores = model(**tokenizer([text for text, _ in rows], padding=True, return_tensors="pt")).logits
    named = [model.config.id2label[index] for index in scores.argmax(-1).tolist()]
    return sum(name == label for name, (_, label) in zip(named, rows, strict=True)) / len(rows)


def test_an_expert_is_an_ordinary_checkpoint_and_learns(pico_base: Path, tmp_path: Path) -> None:
    rows = make_rows()
    folder = tmp_path / "experts" / "colours"
    document = train_expert("colours", pico_base, rows, folder, FEW, measure=True, card="---\nlicense: mit\n---\n")
    assert json.loads((folder / "expert.json").read_text()) == document
    assert document["accuracy"]["expert"]["test"] == 1.0
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.id2label == {0: "B", 1: "R"}
    assert share_right(model, tokenizer, rows.test) == 1.0
    base = AutoModel.from_pretrained(pico_base).state_dict()
    plain = AutoModelForSequenceClassification.from_pretrained(folder)
    plain.base_model.load_state_dict(base)
    assert document["accuracy"]["base"]["test"] == share_right(plain, tokenizer, rows.test)
    moved = {name for name, tensor in model.base_model.state_dict().items() if not tensor.equal(base[name])}
    assert "pooler.dense.weight" in moved
    assert "embeddings.word_embeddings.weight" not in moved
    assert (folder / "README.md").is_file()
    assert [entry.name for entry in folder.parent.iterdir()] == ["colours"]


def test_a_finished_expert_is_not_trained_again(
    pico_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, few, folder = make_rows(), replace(FEW, steps=3), tmp_path / "colours"
    trained = []
    train = experts.fine_tune
    monkeypatch.setattr(experts, "fine_tune", lambda *given: trained.append(given) or train(*given))
    first = train_expert("colours", pico_base, rows, folder, few)
    digest = digest_file(folder / "model.safetensors")
    assert train_expert("colours", pico_base, rows, folder, few) == first
    assert len(trained) == 1
    train_expert("colours", pico_base, rows, folder, replace(few, steps=4))
    assert len(trained) == 2
    assert digest_file(folder / "model.safetensors") != digest
    train_expert("colours", pico_base, rows, folder, few)
    assert digest_file(folder / "model.safetensors") == digest, "the same inputs give the same bytes"
    train_expert("colours", pico_base, replace(rows, training=rows.training[1:]), folder, few)
    assert len(trained) == 4
    with (folder / "model.safetensors").open("ab") as handle:
        handle.write(b"!")
    train_expert("colours", pico_base, replace(rows, training=rows.training[1:]), folder, few)
    assert len(trained) == 5


def test_an_interrupted_training_leaves_no_expert(
    pico_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(experts, "fine_tune", stop)
    with pytest.raises(KeyboardInterrupt):
        train_expert("colours", pico_base, make_rows(), tmp_path / "experts" / "colours", FEW)
    assert list((tmp_path / "experts").iterdir()) == []


def test_a_diverging_training_is_stopped(pico_base: Path, tmp_path: Path) -> None:
    wild = replace(FEW, learning_rate=1e38, head_learning_rate=1e38, warmup_steps=1)
    with pytest.raises(TrainingError, match="'colours' is not finite"):
        train_expert("colours", pico_base, make_rows(), tmp_path / "colours", wild)
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_folder_is_the_users_mistake(pico_base: Path, tmp_path: Path) -> None:
    (tmp_path / "experts").write_text("a file")
    with pytest.raises(OutputError, match="experts"):
        train_expert("colours", pico_base, make_rows(), tmp_path / "experts" / "colours", FEW)


def test_training_leaves_the_callers_random_state_alone(pico_base: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train_expert("colours", pico_base, make_rows(), tmp_path / "colours", replace(FEW, steps=2))
    assert torch.equal(torch.rand(3), expected)


def make_pictures() -> TaskRows:
    """Bright on the left or on the right, with a little of the row's number in it."""
    rows: list[Row] = []
    for index in range(80):
        left, right = (200, 20) if index % 2 else (20, 200)
        rows.append((Picture("L", 2, 1, bytes([left + index // 2, right])), "left" if index % 2 else "right"))
    return TaskRows(("left", "right"), rows[:40], rows[40:50], rows[50:60], rows[60:])


def test_an_image_expert_is_an_ordinary_checkpoint_and_learns(pico_vision_base: Path, tmp_path: Path) -> None:
    rows, folder = make_pictures(), tmp_path / "sides"
    settings = ImageTraining(steps=20, batch_size=8, learning_rate=2e-3, warmup_steps=2)
    document = train_expert("sides", pico_vision_base, rows, folder, settings, measure=True)
    assert document["accuracy"]["expert"]["test"] == 1.0
    model, loading = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"]
    assert type(model).__name__ == "Dinov2ForImageClassification"
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    images = [content.image().convert("RGB") for content, _ in rows.test if isinstance(content, Picture)]
    pixels = processor(images=images, return_tensors="pt")
    assert tuple(pixels["pixel_values"].shape) == (20, 3, 8, 8)
    with torch.inference_mode():
        answers = model(**pixels).logits.argmax(-1).tolist()
    assert [model.config.id2label[answer] for answer in answers] == [label for _, label in rows.test]
    digest = digest_file(folder / "model.safetensors")
    (folder / "expert.json").unlink()
    train_expert("sides", pico_vision_base, rows, folder, settings)
    assert digest_file(folder / "model.safetensors") == digest, "the same inputs give the same bytes"
