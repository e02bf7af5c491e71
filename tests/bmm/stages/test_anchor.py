"""Anchors that need more than weights, and the methods of comparison, on a merge that has run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file

from bmm.anchors.settings import Method, TaskArithmeticSettings
from bmm.grams.store import GramReader
from bmm.pipeline import merge, perform_here, run_stages
from bmm.plan import cached_results
from bmm.recipe import Recipe
from bmm.regression.regmean import regmean
from bmm.sources import fingerprint_inputs
from bmm.stages.registry import STAGES
from bmm.stages.request import Result
from bmm.store import Artefact, Store

Edit = Callable[..., Path]
ORDER = tuple(STAGES)
LINEAR = "encoder.layer.1.intermediate.dense.weight"


def stages(folder: Path, last: str) -> dict[str, Result]:
    recipe = Recipe.from_yaml(folder / "recipe.yaml")
    upto = ORDER[: ORDER.index(last) + 1]
    return run_stages(recipe, fingerprint_inputs(recipe), Store.open(folder / "store"), perform_here, upto)


def made(folder: Path) -> Counter[str]:
    return Counter(entry.kind for entry in Store.open(folder / "store").entries())


def anchor_of(folder: Path) -> Artefact:
    recipe = Recipe.from_yaml(folder / "recipe.yaml")
    store = Store.open(folder / "store")
    return store.read(cached_results(recipe, fingerprint_inputs(recipe), store)["anchor"].reference("anchor"))


def experts_of(folder: Path) -> list[dict[str, torch.Tensor]]:
    stored = [load_file(folder / "experts" / f"task{index}" / "model.safetensors") for index in range(3)]
    return [{name.removeprefix("bert."): tensor for name, tensor in one.items()} for one in stored]


def test_regmean_is_the_closed_form_of_the_merges_own_grams(merged: Path, edit_recipe: Edit) -> None:
    edit_recipe(merged, anchor={"method": "regmean", "off_diagonal": 0.5})
    result = stages(merged, "anchor")
    state = load_file(anchor_of(merged).file("model.safetensors"))
    experts = experts_of(merged)
    store = Store.open(merged / "store")
    readers = [
        GramReader(store.read(result["grams"].reference("experts", f"task{index}")).file("grams.zarr"))
        for index in range(3)
    ]
    group = "encoder.layer.1.intermediate.dense"
    grams = [reader.gram(group) for reader in readers]
    expected = regmean([one[LINEAR] for one in experts], grams, alpha=0.5, where=LINEAR)
    torch.testing.assert_close(state[LINEAR].double(), expected, rtol=1e-5, atol=1e-6)
    bias = f"{group}.bias"
    torch.testing.assert_close(state[bias], torch.stack([one[bias] for one in experts]).mean(0))
    treatments = anchor_of(merged).read_json("treatments.json")
    assert (treatments[LINEAR], treatments[bias]) == ("anchored", "averaged")


def test_fisher_keeps_one_artefact_an_expert_that_other_settings_share(merged: Path, edit_recipe: Edit) -> None:
    edit_recipe(merged, anchor={"method": "fisher", "labels": "data"})
    assert stages(merged, "anchor")["anchor"].state == "ran"
    first = load_file(anchor_of(merged).file("model.safetensors"))
    assert made(merged)["fisher"] == 3
    edit_recipe(merged, anchor={"method": "fisher", "labels": "data", "floor": 1e9, "seed": 5})
    assert stages(merged, "anchor")["anchor"].state == "ran"
    assert made(merged)["fisher"] == 3
    # With such a floor every expert counts alike, but for the norms.
    even = load_file(anchor_of(merged).file("model.safetensors"))
    experts = experts_of(merged)
    mean = torch.stack([one[LINEAR] for one in experts]).mean(0)
    torch.testing.assert_close(even[LINEAR], mean, rtol=1e-2, atol=1e-4)
    assert not torch.allclose(first[LINEAR], mean, rtol=1e-2, atol=1e-4)
    # Each entry lies between the experts'.
    stacked = torch.stack([one[LINEAR] for one in experts])
    assert bool(((first[LINEAR] <= stacked.amax(0) + 1e-6) & (first[LINEAR] >= stacked.amin(0) - 1e-6)).all())


def test_only_the_expert_with_other_rows_is_measured_again(merged: Path, edit_recipe: Edit, in_process: None) -> None:
    edit_recipe(merged, anchor={"method": "fisher"})
    stages(merged, "anchor")
    before = made(merged)["fisher"]
    file = merged / "data" / "task1" / "calibration.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:40]))
    stages(merged, "anchor")
    assert made(merged)["fisher"] == before + 1


SCALED = [
    {"method": "ta"},
    {"method": "ties", "scope": "tensor"},
    {"method": "dare", "then": "ties", "drop": 0.5},
    {"method": "tsv"},
    {"method": "iso-cts"},
]


@pytest.mark.parametrize("settings", SCALED, ids=lambda one: str(one["method"]))
def test_the_scale_that_is_best_on_validation_is_taken(
    settings: dict[str, Any], merged: Path, edit_recipe: Edit
) -> None:
    scales = [0.05, 0.4, 2.0]
    edit_recipe(merged, anchor={**settings, "scale": "validation", "scales": scales})
    assert stages(merged, "anchor")["anchor"].state == "ran"
    chosen = anchor_of(merged)
    said = chosen.read_json("scale.json")
    assert [one["scale"] for one in said["tried"]] == scales
    objectives = [one["objective"] for one in said["tried"]]
    assert len(set(objectives)) > 1, "every scale is equally good, so that this test shows nothing"
    assert said["scale"] == scales[objectives.index(max(objectives))]
    found = load_file(chosen.file("model.safetensors"))
    # What was tried is what the method gives at that scale.
    edit_recipe(merged, anchor={**settings, "scale": said["scale"]})
    stages(merged, "anchor")
    fixed = load_file(anchor_of(merged).file("model.safetensors"))
    for name, tensor in fixed.items():
        torch.testing.assert_close(found[name], tensor, rtol=3e-7, atol=3e-8)
    assert chosen.read_json("treatments.json") == anchor_of(merged).read_json("treatments.json")


def test_the_objective_is_the_share_of_each_experts_accuracy(merged: Path, edit_recipe: Edit) -> None:
    edit_recipe(
        merged,
        anchor={"method": "ta", "scale": "validation", "scales": [0.5]},
        search={"trials": 1, "objective": "share-of-expert"},
    )
    result = stages(merged, "search")
    tried = anchor_of(merged).read_json("scale.json")["tried"][0]
    search = Store.open(merged / "store").read(result["search"].reference("search")).read_json("search.json")
    # The search's first trial is the anchor itself, measured on the same rows.
    assert tried["objective"] == pytest.approx(search["trials"][0]["objective"])
    assert tried["tasks"] == pytest.approx(search["trials"][0]["tasks"])


def test_the_scale_is_chosen_anew_for_another_metric(merged: Path, edit_recipe: Edit, in_process: None) -> None:
    edit_recipe(merged, anchor={"method": "ta", "scale": "validation", "scales": [0.2, 0.8]})
    stages(merged, "anchor")
    first = anchor_of(merged).read_json("scale.json")["tried"]
    experts = Recipe.from_yaml(merged / "recipe.yaml").document()["experts"]
    for expert in experts:
        expert["task"]["metric"] = "f1-macro"
    edit_recipe(merged, experts=experts)
    stages(merged, "anchor")
    second = anchor_of(merged).read_json("scale.json")["tried"]
    assert [one["tasks"] for one in first] != [one["tasks"] for one in second]


def test_a_choice_of_scale_goes_on_where_it_stopped(merged: Path, edit_recipe: Edit) -> None:
    edit_recipe(merged, anchor={"method": "tsv", "scale": "validation", "scales": [0.5, 1.0]})
    stages(merged, "anchor")
    chosen = anchor_of(merged)
    bytes_before = chosen.file("model.safetensors").read_bytes()
    store = Store.open(merged / "store")
    for entry in store.entries():
        if entry.kind == "stage-anchor" or entry.path == chosen.path:
            assert store.discard(entry.kind, entry.key)
    before = made(merged)
    stages(merged, "anchor")
    after = made(merged)
    assert (after["direction"], after["predictions"]) == (before["direction"], before["predictions"])
    assert anchor_of(merged).file("model.safetensors").read_bytes() == bytes_before


@pytest.mark.slow
def test_compared_methods_can_stand_at_their_best_scale(merged: Path, edit_recipe: Edit) -> None:
    evaluation = {"compare": ["average", "ta"], "compare_at": "validation", "bootstrap_samples": 100}
    anchor = {"method": "ta", "scale": "validation", "scales": [0.1, 0.2]}
    path = edit_recipe(merged, anchor=anchor, search={"trials": 1}, evaluation=evaluation)
    document = merge(Recipe.from_yaml(path), store=merged / "store").document
    assert {name: document["anchor"][name] for name in anchor} == anchor
    chosen = document["anchor"]["chosen"]
    assert [one["scale"] for one in chosen["tried"]] == [0.1, 0.2]
    rows = {row["method"]: row["settings"] for row in document["methods"]}
    assert rows["ta (the anchor)"] == {"scale": chosen["scale"], "chosen_on": "validation"}
    assert rows["average"] == {}
    assert rows["ta"]["chosen_on"] == "validation"
    assert rows["ta"]["scale"] in TaskArithmeticSettings().scales


@pytest.mark.slow
def test_every_method_gets_its_row_beside_the_anchor(merged: Path, edit_recipe: Edit) -> None:
    methods = [method for method in get_args(Method) if method != "checkpoint"]
    evaluation: dict[str, Any] = {"compare": methods, "bootstrap_samples": 100}
    edit_recipe(merged, anchor={"method": "regmean"}, search={"trials": 1}, evaluation=evaluation)
    result = stages(merged, "evaluate")["evaluate"]
    document = Store.open(merged / "store").read(result.reference("evaluation")).read_json("evaluation.json")
    rows = {row["method"]: row for row in document["methods"]}
    assert set(methods) <= set(rows)
    # The anchor is the method at its published settings, so it has no row of its own; one model answers for both.
    assert not any(name.endswith("(the anchor)") for name in rows)
    for task in ("task0", "task1", "task2"):
        assert rows["regmean"]["tasks"][task] == document["metrics"]["test"][task]["anchor"]
    assert rows["regmean"]["settings"] == {"off_diagonal": 0.9}
