"""Anchors that need more than weights, and the methods of comparison, on a merge that has run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file

from bmm.anchors.settings import Method
from bmm.grams.store import GramReader
from bmm.pipeline import perform_here, run_stages
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
    return run_stages(recipe, fingerprint_inputs(recipe), Store(folder / "store"), perform_here, upto)


def made(folder: Path) -> Counter[str]:
    return Counter(entry.kind for entry in Store(folder / "store").entries())


def anchor_of(folder: Path) -> Artefact:
    recipe = Recipe.from_yaml(folder / "recipe.yaml")
    store = Store(folder / "store")
    return store.read(cached_results(recipe, fingerprint_inputs(recipe), store)["anchor"].reference("anchor"))


def experts_of(folder: Path) -> list[dict[str, torch.Tensor]]:
    stored = [load_file(folder / "experts" / f"task{index}" / "model.safetensors") for index in range(3)]
    return [{name.removeprefix("bert."): tensor for name, tensor in one.items()} for one in stored]


def test_regmean_is_the_closed_form_of_the_merges_own_grams(merged: Path, edit_recipe: Edit) -> None:
    edit_recipe(merged, anchor={"method": "regmean", "off_diagonal": 0.5})
    result = stages(merged, "anchor")
    state = load_file(anchor_of(merged).file("model.safetensors"))
    experts = experts_of(merged)
    store = Store(merged / "store")
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


@pytest.mark.slow
def test_every_method_gets_its_row_beside_the_anchor(merged: Path, edit_recipe: Edit) -> None:
    methods = [method for method in get_args(Method) if method != "checkpoint"]
    evaluation: dict[str, Any] = {"compare": methods, "bootstrap_samples": 100}
    edit_recipe(merged, anchor={"method": "regmean"}, search={"trials": 1}, evaluation=evaluation)
    result = stages(merged, "evaluate")["evaluate"]
    document = Store(merged / "store").read(result.reference("evaluation")).read_json("evaluation.json")
    rows = {row["method"]: row for row in document["methods"]}
    assert set(methods) <= set(rows)
    # The anchor is the method at its published settings, so it has no row of its own; one model answers for both.
    assert not any(name.endswith("(the anchor)") for name in rows)
    for task in ("task0", "task1", "task2"):
        assert rows["regmean"]["tasks"][task] == document["metrics"]["test"][task]["anchor"]
    assert rows["regmean"]["settings"] == {"off_diagonal": 0.9}
