"""A whole merge of experts with tokens of their own, and of one whose table is padded."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import bmm
from bmm.recipe import Recipe

pytestmark = pytest.mark.slow
TABLE = "embeddings.word_embeddings.weight"


def regrow(folder: Path, name: str, rows: int, words: dict[str, str]) -> None:
    """Fine-tune an expert anew with more rows, and with tokens of its own for some words of its texts."""
    place, data = folder / "experts" / name, folder / "data" / name
    for file in data.iterdir():
        text = file.read_text()
        for old, new in words.items():
            text = re.sub(rf"\b{old}\b", new, text)
        file.write_text(text)
    tokenizer = AutoTokenizer.from_pretrained(place)
    tokenizer.add_tokens(list(words.values()))
    tokenizer.save_pretrained(place)
    model = AutoModelForSequenceClassification.from_pretrained(place)
    torch.manual_seed(5)
    model.resize_token_embeddings(rows, mean_resizing=False)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    texts = [json.loads(line) for line in (data / "calibration.jsonl").read_text().splitlines()]
    for start in [*range(0, len(texts), 16)] * 4:
        batch = texts[start : start + 16]
        inputs = tokenizer([row["text"] for row in batch], padding=True, return_tensors="pt")
        labels = torch.tensor([model.config.label2id[row["label"]] for row in batch])
        inputs.pop("token_type_ids", None)
        model(**inputs, labels=labels).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    model.save_pretrained(place)


def accuracy(model: Any, tokenizer: Any, data: Path) -> float:
    rows = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    inputs = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    with torch.inference_mode():
        answers = model.eval()(**inputs).logits.argmax(-1).tolist()
    return sum(model.config.id2label[a] == row["label"] for a, row in zip(answers, rows, strict=True)) / len(rows)


@pytest.mark.parametrize("anchor", ["wudi", "fisher"])
def test_shared_rows_are_merged_and_own_rows_travel(
    pico: Path, in_process: None, edit_recipe: Callable[..., Path], anchor: str
) -> None:
    mode = "propagated" if anchor == "wudi" else "module-wise"
    path = edit_recipe(
        pico,
        anchor={"method": anchor},
        search={"trials": 2, "per": "model"},
        evaluation={"compare": ["average"]},
        regression={"mode": mode},
    )
    regrow(pico, "task1", 69, {"w15": "n0", "w20": "n1", "w3": "n2", "w4": "n3"})
    regrow(pico, "task2", 128, {"w25": "m0"})
    merged = bmm.merge(Recipe.from_yaml(path), store=pico / "store")
    document = json.loads((merged.output / "merge.json").read_text())
    weights = load_file(merged.output / "model.safetensors")
    assert weights[TABLE].shape == (65, 16)
    (entry,) = (entry for entry in document["coverage"] if "shared_rows" in entry)
    assert (entry["parameter"], entry["shape"], entry["shared_rows"]) == (TABLE, [65, 16], 65)
    assert [expert["own_tokens"] for expert in document["experts"]] == [0, 4, 63]
    assert {e["name"]: e["own_tokenizer"] for e in document["experts"]} == {
        "task0": False,
        "task1": True,
        "task2": True,
    }
    heads = {name: load_file(merged.output / "heads" / f"{name}.safetensors") for name in ("task0", "task1", "task2")}
    own = f"bert.{TABLE.replace('weight', 'extra_weight')}"
    assert own not in heads["task0"]
    for name, rows in (("task1", 4), ("task2", 63)):
        stored = load_file(pico / "experts" / name / "model.safetensors")[f"bert.{TABLE}"]
        assert torch.equal(heads[name][own], stored[65:])
        assert len(heads[name][own]) == rows
    card = (merged.output / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    for name in ("task0", "task1", "task2"):
        measured = document["metrics"]["test"][name]
        expert = AutoModelForSequenceClassification.from_pretrained(pico / "experts" / name)
        tokenizer = AutoTokenizer.from_pretrained(pico / "experts" / name)
        assert measured["expert"] == pytest.approx(accuracy(expert, tokenizer, pico / "data" / name))
        found: dict[str, Any] = {}
        exec(code.replace("path/to/this/folder", str(merged.output)).replace("'task0'", f"'{name}'"), found)  # noqa: S102
        assert measured["merged"] == pytest.approx(accuracy(found["model"], found["tokenizer"], pico / "data" / name))
