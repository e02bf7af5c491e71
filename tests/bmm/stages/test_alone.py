"""Merges without regression: the anchor alone, from the recipe to the output folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

import bmm
from bmm.errors import CheckpointError, RecipeError
from bmm.pipeline import Merge
from bmm.plan import make_plan, require_fit
from bmm.sources import fingerprint_inputs
from bmm.store import Store

NAMES = ("task0", "task1", "task2")


@pytest.fixture
def alone(pico: Path, edit_recipe: Callable[..., Path]) -> Callable[..., Path]:
    """Return a function that makes the pico recipe one without regression, with other keys."""

    def edit(**changes: Any) -> Path:
        gone = {"search": None, "grams": None, "evaluation": None}
        return edit_recipe(pico, **{**gone, "anchor": {"method": "ta", "scale": 0.4}, **changes})

    return edit


def merged(path: Path) -> Merge:
    return bmm.merge(bmm.Recipe.from_yaml(path), store=path.parent / "store")


def told(made: Merge) -> Any:
    return json.loads((made.output / "merge.json").read_text(encoding="utf-8"))


def test_the_output_is_the_anchor_and_no_other_stage_runs(alone: Callable[..., Path], pico: Path) -> None:
    path = alone(regression={"mode": "none"})
    recipe = bmm.Recipe.from_yaml(path)
    plan = make_plan(recipe, fingerprint_inputs(recipe), Store.open(pico / "store"))
    require_fit(plan, recipe)
    assert [stage.stage for stage in plan.stages] == ["experts", "publish"]
    made = merged(path)
    document = told(made)
    assert list(document["stages"]) == ["experts", "publish"]
    assert (document["metrics"], document["methods"], document["search"]["lambda"]) == ({}, [], "none")
    assert {entry["treatment"] for entry in document["coverage"]} == {"anchored"}
    assert not any("names no" in note for note in document["notes"])
    card = (made.output / "README.md").read_text(encoding="utf-8")
    assert "by task arithmetic" in card
    assert "Bayesian regression" not in card.partition("## How to load it")[0]
    assert "Nothing was regressed" in (made.output / "report.html").read_text(encoding="utf-8")

    base = load_file(pico / "base" / "model.safetensors")
    experts = [load_file(pico / "experts" / name / "model.safetensors") for name in NAMES]
    found = AutoModel.from_pretrained(made.output).state_dict()
    for name, start in base.items():
        total = sum(expert[f"bert.{name}"].double() - start.double() for expert in experts if f"bert.{name}" in expert)
        torch.testing.assert_close(found[name], (start.double() + 0.4 * total).float(), rtol=0, atol=1e-7, msg=name)
    assert {file.stem for file in (made.output / "heads").glob("*.safetensors")} == set(NAMES)
    again = merged(path)
    assert {stage["state"] for stage in told(again)["stages"].values()} == {"cached"}
    assert (pico / "store" / "artefacts" / "anchor").exists() is False


def test_no_row_is_read_and_the_bytes_do_not_depend_on_the_threads(alone: Callable[..., Path], pico: Path) -> None:
    path = alone(regression={"mode": "none"}, dtype="bfloat16", anchor={"method": "tsv"})
    contents = []
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        made = bmm.merge(bmm.Recipe.from_yaml(path), store=pico / f"store{threads}")
        contents.append((made.output / "model.safetensors").read_bytes())
    torch.set_num_threads(before)
    assert contents[0] == contents[1]
    assert load_file(made.output / "model.safetensors")["embeddings.word_embeddings.weight"].dtype == torch.bfloat16
    heads = [load_file(file) for file in (made.output / "heads").iterdir()]
    assert {tensor.dtype for head in heads for tensor in head.values()} == {torch.bfloat16}


def test_large_files_are_not_kept_twice(
    alone: Callable[..., Path], pico: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bmm.publication._LINKED_BYTES", 1000)
    made = merged(alone(regression={"mode": "none"}))
    (kept,) = (pico / "store" / "artefacts" / "model").glob("*/model.safetensors")
    assert os.path.samefile(kept, made.output / "model.safetensors")
    assert not os.path.samefile(kept.with_name("config.json"), made.output / "config.json")


def test_an_expert_that_is_not_finite_is_named(alone: Callable[..., Path], pico: Path) -> None:
    weights = pico / "experts" / "task1" / "model.safetensors"
    state = load_file(weights)
    state["bert.encoder.layer.1.output.dense.weight"][3, 4] = torch.inf
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"encoder\.layer\.1\.output\.dense\.weight.*expert 2 of 3"):
        merged(alone(regression={"mode": "none"}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"anchor": {"method": "regmean"}}, "'anchor'"),
        ({"anchor": {"method": "fisher"}}, "'anchor'"),
        ({"anchor": {"method": "ta", "scale": "validation"}}, "'anchor'"),
        ({"search": {"trials": 4}}, "'search.trials'"),
        ({"regression": {"mode": "none", "lambda": 0.1}}, "'regression.lambda'"),
    ],
)
def test_what_asks_for_more_than_weights_is_refused(
    alone: Callable[..., Path], changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        bmm.Recipe.from_yaml(alone(**{"regression": {"mode": "none"}, **changes}))
