"""Heads fitted to a merged encoder, through whole merges of pico experts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from bmm.errors import CheckpointError, RecipeError
from bmm.pipeline import STAGES, merge, perform_here, run_stages
from bmm.plan import cached_results
from bmm.recipe import Recipe
from bmm.regression.head import fitted_head
from bmm.sources import fingerprint_inputs, fingerprint_model
from bmm.stages.evaluate import evaluate_checkpoint
from bmm.stages.heads import heads_in
from bmm.stages.objective import Objective
from bmm.stages.request import Work
from bmm.store import Store

Edit = Callable[..., Path]
FITTED = {"mode": "propagated", "lambda": 0.1, "heads": 0.1}


def run(folder: Path) -> tuple[dict[str, Any], Path]:
    """Merge, and return the document and the output folder."""
    found = merge(Recipe.from_yaml(folder / "recipe.yaml"), store=folder / "store")
    return json.loads((found.output / "merge.json").read_text(encoding="utf-8")), found.output


@pytest.mark.parametrize("regression", [FITTED, {**FITTED, "mode": "module-wise"}])
def test_the_output_has_the_fitted_heads_and_is_measured_with_them(
    merged: Path, edit_recipe: Edit, in_process: None, regression: dict[str, Any]
) -> None:
    path = edit_recipe(merged, regression={**regression, "heads": "keep"}, search="none", output="./plain")
    plain, kept = run(merged)
    edit_recipe(merged, regression=regression, search="none", output="./fitted")
    document, output = run(merged)
    assert (kept / "model.safetensors").read_bytes() == (output / "model.safetensors").read_bytes()
    for expert in ("task0", "task1", "task2"):
        own, fitted = (load_file(folder / "heads" / f"{expert}.safetensors") for folder in (kept, output))
        assert own.keys() == fitted.keys()
        changed = {name for name in own if not torch.equal(own[name], fitted[name])}
        assert changed == {"classifier.weight", "classifier.bias"}
        rows = (merged / "data" / expert / "calibration.jsonl").read_text(encoding="utf-8").splitlines()
        tokens = AutoTokenizer.from_pretrained(merged / "experts" / expert)(
            [json.loads(row)["text"] for row in rows], padding=True, truncation=True, max_length=16, return_tensors="pt"
        )
        with torch.inference_mode():
            answers = AutoModelForSequenceClassification.from_pretrained(merged / "experts" / expert)(**tokens).logits
            read = AutoModel.from_pretrained(output)(**tokens).pooler_output
        expected = fitted_head(read, answers, own["classifier.weight"], own["classifier.bias"], 0.1)
        torch.testing.assert_close(fitted["classifier.weight"], expected[:, :-1], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(fitted["classifier.bias"], expected[:, -1], rtol=1e-3, atol=1e-4)
    recipe = Recipe.from_yaml(path)
    inputs = fingerprint_inputs(recipe, check_output_folder=False)
    work = Work(Store.open(merged / "store"))
    results = run_stages(recipe, inputs, work.store, perform_here, ("experts",))
    # What was measured is what is published.
    output_model = fingerprint_model(str(output), merged, "the model")
    again = evaluate_checkpoint(work, recipe, inputs, results, output_model, "test")
    for task, found in again["tasks"].items():
        assert found["model"] == document["metrics"]["test"][task]["merged"]
    assert document["metrics"]["test"] != plain["metrics"]["test"]


def test_a_layer_at_a_time_gives_the_same_bytes(merged: Path, edit_recipe: Edit, in_process: None) -> None:
    heads = []
    for limit in ("8GiB", "1MiB"):
        cluster = {"workers": 1, "memory_limit": limit}
        recipe = Recipe.from_yaml(edit_recipe(merged, regression=FITTED, search="none", cluster=cluster))
        store = Store.open(merged / f"store-{limit}")
        results = run_stages(recipe, fingerprint_inputs(recipe), store, perform_here, STAGES[:-2])
        found = store.read(results["search"].reference("search")).path / "heads"
        heads.append({file.name: file.read_bytes() for file in found.iterdir()})
    assert sorted(heads[0]) == [f"task{index}.safetensors" for index in range(3)]
    assert heads[0] == heads[1]


@pytest.mark.parametrize("heads", [0.1, "keep"])
def test_in_half_precision_heads_are_rounded_before_they_are_measured(
    merged: Path, edit_recipe: Edit, in_process: None, heads: float | str
) -> None:
    # With the experts' heads and nothing searched no row is read to merge.
    said: dict[str, Any] = {"regression": {"mode": "module-wise", "lambda": 0.1, "heads": heads}, "search": "none"}
    edit_recipe(merged, **said, evaluation={"compare": []}, dtype="bfloat16")
    document, output = run(merged)
    recipe = Recipe.from_yaml(merged / "recipe.yaml")
    store = Store.open(merged / "store")
    results = cached_results(recipe, fingerprint_inputs(recipe, check_output_folder=False), store)
    known = heads_in(store.read(results["search"].reference("search")).path)
    for expert in ("task0", "task1", "task2"):
        published = load_file(output / "heads" / f"{expert}.safetensors")
        assert {tensor.dtype for tensor in published.values()} == {torch.bfloat16}
        assert published.keys() == known[expert].keys()
        assert all(torch.equal(tensor, known[expert][name]) for name, tensor in published.items())
        own = load_file(merged / "experts" / expert / "model.safetensors")
        kept = torch.equal(published["classifier.weight"], own["classifier.weight"].to(torch.bfloat16))
        assert kept == (heads == "keep")
    for task, found in measured(merged).items():
        assert found["model"] == document["metrics"]["test"][task]["merged"]


def measured(folder: Path) -> dict[str, Any]:
    """Measure a folder's output by its recipe, as `bmm eval` does."""
    recipe = Recipe.from_yaml(folder / "recipe.yaml")
    inputs = fingerprint_inputs(recipe, check_output_folder=False)
    work = Work(Store.open(folder / "store"))
    results = run_stages(recipe, inputs, work.store, perform_here, ("experts",))
    output = fingerprint_model(str(folder / "merged"), folder, "the model")
    found: dict[str, Any] = evaluate_checkpoint(work, recipe, inputs, results, output, "test")["tasks"]
    return found


def retrained(expert: Path, names: list[str], rows: list[int]) -> None:
    """Give an expert's classifier other rows, a class each, and these names."""
    file = expert / "model.safetensors"
    tensors = load_file(file)
    tensors |= {name: tensors[name][rows].contiguous() for name in ("classifier.weight", "classifier.bias")}
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((expert / "config.json").read_text(encoding="utf-8"))
    config |= {"id2label": {str(index): name for index, name in enumerate(names)}}
    config |= {"label2id": {name: index for index, name in enumerate(names)}}
    (expert / "config.json").write_text(json.dumps(config), encoding="utf-8")


def test_a_head_is_measured_by_the_names_of_its_classes_and_not_by_their_order(merged: Path) -> None:
    before = measured(merged)["task0"]
    expert = merged / "experts" / "task0"
    retrained(expert, ["no", "yes"], [1, 0])
    assert measured(merged)["task0"] == before
    retrained(expert, ["no", "yes", "perhaps"], [0, 1, 1])
    with pytest.raises(CheckpointError, match=r"'task0' in .* is of the classes yes, no, but .* no, yes, perhaps"):
        measured(merged)


def test_position_ids_that_older_checkpoints_hold_change_no_head(
    merged: Path, edit_recipe: Edit, in_process: None
) -> None:
    heads = []
    for output in ("without", "with"):
        edit_recipe(merged, regression=FITTED, search="none", output=f"./{output}")
        _, folder = run(merged)
        heads.append([(folder / "heads" / f"task{index}.safetensors").read_bytes() for index in range(3)])
        for model, prefix in (("base", ""), *((f"experts/task{index}", "bert.") for index in range(3))):
            file = merged / model / "model.safetensors"
            ids = {f"{prefix}embeddings.position_ids": torch.arange(32)[None]}
            save_file(load_file(file) | ids, file, metadata={"format": "pt"})
    assert heads[0] == heads[1]


@pytest.mark.parametrize(
    ("grams", "regression", "expected"),
    [
        ({"source": "activations"}, {"mode": "propagated"}, 0.1),
        ({"source": "activations"}, {"mode": "module-wise"}, 0.1),
        ({"source": "hybrid"}, {}, 0.1),
        ({"source": "task-vectors"}, {}, None),
        ({"source": "task-vectors"}, {"heads": 0.3}, 0.3),
        ({"source": "activations"}, {"mode": "module-wise", "heads": "keep"}, None),
        ({"source": "activations"}, {"heads": "keep"}, None),
    ],
)
def test_by_default_heads_are_fitted_where_calibration_rows_are_read(
    pico: Path, edit_recipe: Edit, grams: dict[str, Any], regression: dict[str, Any], expected: float | None
) -> None:
    recipe = Recipe.from_yaml(edit_recipe(pico, grams=grams, regression=regression))
    assert recipe.regression.settings().get("heads") == expected
    assert recipe.regression.fits_heads == expected


def test_a_search_is_not_run_again_for_other_heads(
    merged: Path, edit_recipe: Edit, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: dict[str, Any] = {"search": {"trials": 3, "per": "model"}}
    kept, _ = run(edit_recipe(merged, regression={"mode": "module-wise", "heads": "keep"}, **said).parent)
    monkeypatch.setattr(Objective, "evaluate", lambda *_: pytest.fail("a trial was measured again"))
    fitted, _ = run(edit_recipe(merged, regression={"mode": "module-wise"}, **said).parent)
    assert "heads" not in kept["search"]
    assert fitted["search"]["heads"]["lambda"] == 0.1
    assert fitted["search"]["trials"] == kept["search"]["trials"]


def test_heads_need_rows(pico: Path, edit_recipe: Edit) -> None:
    path = edit_recipe(pico, regression={"mode": "none", "heads": 0.1}, search="none")
    with pytest.raises(RecipeError, match="no row is read, and a head is fitted on rows"):
        Recipe.from_yaml(path)
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    del recipe["experts"][1]["task"]["calibration"]
    recipe |= {"grams": {"source": "task-vectors"}, "regression": {"heads": 0.1, "lambda": 0.1}}
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    with pytest.raises(RecipeError, match=r"'regression\.heads' needs calibration rows"):
        Recipe.from_yaml(path)
