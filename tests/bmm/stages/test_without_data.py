"""Merges of pico experts without rows, or with some of them only, from the recipe to what is told of the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModel

import bmm
from bmm.errors import RecipeError
from bmm.pipeline import Merge
from bmm.plan import make_plan, require_fit
from bmm.regression.evidence import Evidence, most_probable
from bmm.regression.posterior import decompose, factor, residual_and_energy
from bmm.requests import Requests
from bmm.sources import fingerprint_inputs
from bmm.stages.request import Work
from bmm.stages.sample import evaluate_samples
from bmm.store import Store

Edit = Callable[..., Path]


@pytest.fixture
def without(pico: Path) -> Callable[..., Path]:
    """Return a function that takes splits out of the pico recipe, or whole tasks, and sets other keys."""

    def edit(*splits: str, **changes: Any) -> Path:
        path = pico / "recipe.yaml"
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        for expert in recipe["experts"]:
            if "task" in splits:
                del expert["task"]
            for split in set(splits) - {"task"}:
                del expert["task"][split]
        recipe = {key: value for key, value in recipe.items() if key not in ("search", "grams")}
        recipe |= changes
        path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        return path

    return edit


def merged(path: Path) -> Merge:
    return bmm.merge(bmm.Recipe.from_yaml(path), store=path.parent / "store")


def test_a_recipe_without_any_data_becomes_a_model(without: Callable[..., Path], pico: Path) -> None:
    path = without("task")
    (pico / "data").rename(pico / "gone")
    recipe = bmm.Recipe.from_yaml(path)
    plan = make_plan(recipe, fingerprint_inputs(recipe), Store.open(pico / "store"))
    require_fit(plan, recipe)
    assert "no data" in next(stage.note for stage in plan.stages if stage.stage == "grams")
    made = merged(path)
    document = json.loads((made.output / "merge.json").read_text(encoding="utf-8"))
    assert made.share_of_experts is None
    assert (document["metrics"], document["methods"]) == ({}, [])
    assert document["data"] == {f"task{index}": {} for index in range(3)}
    assert document["grams"]["source"] == "task-vectors"
    assert document["search"]["trials"] == []
    assert document["search"]["lambda"] in ("fixed", "evidence")
    assert any("not measured" in note for note in document["notes"])
    regressed = [entry for entry in document["coverage"] if entry["treatment"] == "regressed"]
    assert len(regressed) == 13
    for entry in regressed:
        assert entry["parameter"].endswith("weight")
        assert entry["lambda"] > 0
        assert entry["gamma"] == 1.0
        assert entry["condition"] > 1
    for name in ("report.html", "README.md"):
        told = (made.output / name).read_text(encoding="utf-8")
        assert "the recipe names no test rows" in told
        assert "task vectors, without any data" in told
        assert "validation rows of the same tasks" not in told
    # It loads as any other, and its regressed weights are neither the base's nor the anchor's.
    model = AutoModel.from_pretrained(made.output)
    state = model.state_dict()
    base = load_file(pico / "base" / "model.safetensors")
    store = Store.open(pico / "store")
    anchor = load_file(store.read(made.results["anchor"].reference("anchor")).file("model.safetensors"))
    for entry in document["coverage"]:
        name = entry["parameter"]
        same = torch.equal(state[name], anchor[name])
        assert same == (entry["treatment"] != "regressed"), name
    assert not torch.equal(state["pooler.dense.weight"], base["pooler.dense.weight"])
    assert sorted(file.name for file in (made.output / "heads").iterdir()) == [f"task{i}.safetensors" for i in range(3)]
    assert {entry.kind for entry in store.entries()}.isdisjoint({"gram-shard", "predictions"})
    again = merged(path)
    assert {result.state for result in again.results.values()} == {"cached"}


def test_the_evidence_chooses_without_data(without: Callable[..., Path], pico: Path) -> None:
    path = without("task", regression={"lambda": "evidence"}, search={"per": "module"})
    made = merged(path)
    search = made.document["search"]
    assert search["lambda"] == "evidence"
    chosen = {group: setting["lambda"] for group, setting in search["best"]["settings"].items()}
    assert len(chosen) == 13
    assert len(set(chosen.values())) > 1
    name = "encoder.layer.1.output.dense"
    anchor = load_file(
        Store.open(pico / "store").read(made.results["anchor"].reference("anchor")).file("model.safetensors")
    )[f"{name}.weight"].double()
    base = load_file(pico / "base" / "model.safetensors")[f"{name}.weight"].double()
    experts = [
        load_file(pico / "experts" / f"task{i}" / "model.safetensors")[f"bert.{name}.weight"].double() for i in range(3)
    ]
    vectors = [expert - base for expert in experts]
    grams = [vector.T @ vector / vector.square().sum() for vector in vectors]
    pull, energy = residual_and_energy(anchor, experts, grams)
    spectrum = decompose(torch.stack(grams).sum(0), where=name)
    evidence = Evidence.of(factor(spectrum, anchor, pull), energy, 3 * 16)
    assert chosen[name] == pytest.approx(most_probable([evidence], (-4.0, 2.0)), rel=2e-3)
    # Where the strength comes from is a part of the search's key, a seed of no search is not.
    path = without(regression={"lambda": "evidence"}, search={"per": "module", "seed": 5, "gamma": [0.5, 1.5]})
    assert merged(path).results["search"].state == "cached"
    path = without(regression={"lambda": "evidence"}, search={"per": "module", "log10_lambda": [-1, 2]})
    changed = merged(path)
    assert changed.results["search"].state == "ran"
    assert min(setting["lambda"] for setting in changed.document["search"]["best"]["settings"].values()) >= 0.1


def test_with_test_rows_alone_everything_but_the_search_works(without: Callable[..., Path], pico: Path) -> None:
    numbers = {"qkv": 0.5, "attention-out": 0.4, "mlp-in": 0.3, "mlp-out": 0.2, "other": 0.1}
    path = without("calibration", "validation", regression={"lambda": numbers})
    made = merged(path)
    assert made.share_of_experts is not None
    assert list(made.document["metrics"]) == ["test"]
    assert {row["method"] for row in made.document["methods"]} >= {"merged", "wudi", "regmean"}
    regmean = next(row for row in made.document["methods"] if row["method"] == "regmean")
    assert regmean["settings"]["grams"] == "task-vectors"
    assert {entry["lambda"] for entry in made.document["coverage"] if entry["treatment"] == "regressed"} == set(
        numbers.values()
    )
    assert not any("not measured" in note for note in made.document["notes"])
    store = Store.open(pico / "store")
    recipe = bmm.Recipe.from_yaml(path)
    requests = Requests(recipe, fingerprint_inputs(recipe))
    with pytest.raises(RecipeError, match="samples are measured on validation rows, and the recipe names none"):
        evaluate_samples(
            Work(store),
            requests.build("search", made.results),
            requests.build("evaluate", made.results),
            made.results["search"].reference("search"),
            recipe.evaluation,
            "test",
            2,
            0,
        )
    told = (made.output / "report.html").read_text(encoding="utf-8")
    assert "Strength of the prior" in told
    assert "without a search" in told
    del numbers["other"]
    path = without(regression={"lambda": numbers})
    with pytest.raises(RecipeError, match="the module group 'other' has no number"):
        merged(path)


def test_the_walk_needs_no_validation_rows(without: Callable[..., Path], in_process: None) -> None:
    made = merged(without("validation", regression={"lambda": "evidence"}, evaluation={"compare": []}))
    settings = made.document["search"]["best"]["settings"]
    assert len({setting["lambda"] for setting in settings.values()}) > 1
    made = merged(without(regression={"lambda": 0.3}, evaluation={"compare": []}))
    said = made.document["recipe"]["regression"]
    assert (said["mode"], said["lambda"], said["walk_lambda"]) == ("propagated", 0.3, 0.3)
    lambdas = {entry["lambda"] for entry in made.document["coverage"] if entry["treatment"] == "regressed"}
    assert lambdas == {0.3}
    assert any(entry["parameter"].endswith("bias") for entry in made.document["coverage"] if entry["lambda"] == 0.3)
    # Nothing reads Gram matrices: the walk makes its own moments, and no method of comparison asks for any.
    assert made.document["grams"]["experts"] == {}
    assert "grams" not in {entry.kind for entry in Store.open(made.output.parent / "store").entries()}
