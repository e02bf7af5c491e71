from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bmm.pipeline import STAGES
from bmm.recipe import Recipe
from bmm.requests import HEAD_ROWS, Requests
from bmm.search.plan import ELECTION, RACES
from bmm.sources import Expert, Inputs, Model
from bmm.stages.request import Result

SPLITS = {split: {"path": "json", "data_files": f"{split}.jsonl"} for split in ("calibration", "validation", "test")}
VALUES: dict[str, Any] = {
    "base_model": "base",
    "experts": [{"name": name, "model": name, "task": SPLITS} for name in ("one", "two")],
    "output": "merged",
    "anchor": {"method": "checkpoint", "path": "anchor"},
}


def inputs(**changes: str) -> Inputs:
    """Return inputs whose digests and places can be changed by name."""

    def model(name: str) -> Model:
        return Model(name, changes.get(f"{name}.path", f"/{name}"), None, changes.get(name, f"digest of {name}"))

    experts = tuple(
        Expert(name, model(name), {"max_length": 16}, {"test": {"files": [changes.get(f"{name}.data", "rows")]}})
        for name in ("one", "two")
    )
    return Inputs(model("base"), experts, model("anchor"))


def keys(recipe: Recipe, given: Inputs) -> dict[str, str]:
    """Return every stage's key; a stage's artefacts are named by its key, so that changes travel on."""
    requests = Requests(recipe, given)
    results: dict[str, Result] = {}
    for stage in STAGES:
        request = requests.build(stage, results)
        references = {name: f"{stage} {request.key} {name}" for name in ("one", "two")}
        name = "search" if stage == "search" else "anchor" if stage == "anchor" else "layout"
        outputs = {name: f"{stage} {request.key}", "experts": references}
        results[stage] = Result(stage, request.key, "ran", 0.0, outputs)
    return {stage: result.key for stage, result in results.items()}


def changed(values: dict[str, Any] | None = None, **digests: str) -> set[str]:
    before = keys(Recipe.from_mapping(VALUES), inputs())
    after = keys(Recipe.from_mapping({**VALUES, **(values or {})}), inputs(**digests))
    return {stage for stage in STAGES if before[stage] != after[stage]}


EVERYTHING = set(STAGES)


@pytest.mark.parametrize(
    ("values", "stages"),
    [
        ({"output": "elsewhere"}, set()),
        ({"cluster": {"workers": 7, "scheduler": "tcp://host:1", "memory_limit": "1GiB"}}, set()),
        ({"tracking": {"enabled": False, "experiment": "other"}}, set()),
        ({"search": {"trials": 3}}, {"search", "evaluate", "publish"}),
        ({"search": {"seed": 3}}, {"search", "evaluate", "publish"}),
        ({"search": {"gamma": [0.8, 1.2]}}, {"search", "evaluate", "publish"}),
        ({"regression": {"mode": "module-wise"}}, {"search", "evaluate", "publish"}),
        ({"coverage": {"minimum": 0.1}}, {"search", "evaluate", "publish"}),
        ({"dtype": "bfloat16"}, {"search", "evaluate", "publish"}),
        ({"max_shard_size": "1MB"}, {"publish"}),
        ({"evaluation": {"bootstrap_samples": 300}}, {"evaluate"}),
        ({"evaluation": {"compare": ["average", "regmean"]}}, {"evaluate"}),
        ({"evaluation": {"compare": ["average"]}}, {"grams", "evaluate"}),
        ({"evaluation": {"batch_size": 7}}, {"search", "evaluate", "publish"}),
        ({"grams": {"shard_rows": 7}}, {"grams", "evaluate"}),
        ({"grams": {"batch_size": 7}}, {"grams", "evaluate"}),
        ({"grams": {"tokens_seed": 7}}, set()),
        # The walk samples its rows too.
        ({"grams": {"tokens": 7}}, {"grams", "search", "evaluate", "publish"}),
        ({"grams": {"source": "task-vectors"}}, {"grams", "search", "evaluate", "publish"}),
        ({"anchor": {"method": "ta"}}, {"anchor", "search", "evaluate", "publish"}),
    ],
)
def test_a_change_of_the_recipe_reaches_the_stages_that_depend_on_it(values: dict[str, Any], stages: set[str]) -> None:
    assert changed(values) == stages


def test_without_a_sample_of_tokens_no_request_speaks_of_one() -> None:
    def settings(**grams: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        found = Requests(Recipe.from_mapping({**VALUES, "grams": grams}), inputs())
        done = Result("any", "", "ran", 0.0, dict.fromkeys(("layout", "experts", "anchor"), ""))
        results = dict.fromkeys(STAGES, done)
        grams_, search = (dict(found.build(stage, results).settings) for stage in ("grams", "search"))
        return grams_, search

    grams, search = settings(tokens_seed=3)
    assert grams == {"source": "activations", "shard_rows": 128, "batch_size": 32}
    assert search.keys() == {
        "search",
        "regression",
        "minimum_coverage",
        "dtype",
        "batch_size",
        "proposals",
        "head_rows",
    }
    sample = {"tokens": 4, "tokens_seed": 3}
    assert settings(**sample) == ({**grams, **sample}, {**search, **sample})


def test_only_searches_whose_races_have_changed_begin_anew() -> None:
    def settings(**search: Any) -> dict[str, Any]:
        done = Result("any", "", "ran", 0.0, dict.fromkeys(("layout", "experts", "anchor"), ""))
        found = Requests(Recipe.from_mapping({**VALUES, "search": search}), inputs())
        return dict(found.build("search", dict.fromkeys(STAGES, done)).settings)

    assert "races" not in settings()
    assert "races" not in settings(floors={"all": 0.9}, racing=False)
    assert settings(floors={"all": 0.9})["races"] == settings(also="worst-task", searcher="random")["races"] == RACES


@pytest.mark.parametrize(("objective", "versioned"), [("nll", True), ("agreement", True), ("share-of-expert", False)])
def test_only_searches_whose_objective_is_not_the_metric_begin_anew(objective: str, versioned: bool) -> None:
    done = Result("any", "", "ran", 0.0, dict.fromkeys(("layout", "experts", "anchor"), ""))
    found = Requests(Recipe.from_mapping({**VALUES, "search": {"objective": objective}}), inputs())
    settings = found.build("search", dict.fromkeys(STAGES, done)).settings
    assert settings.get("election") == (ELECTION if versioned else None)


def test_only_merges_of_half_precision_say_the_dtype_of_heads() -> None:
    def said(stage: str, **values: Any) -> dict[str, Any]:
        done = Result("any", "", "ran", 0.0, dict.fromkeys(("layout", "experts", "anchor", "search"), ""))
        found = Requests(Recipe.from_mapping({**VALUES, **values}), inputs())
        request = found.build(stage, dict.fromkeys(STAGES, done))
        return {**request.settings, **dict.fromkeys(request.inputs)}

    for stage in ("search", "publish"):
        assert "head_dtype" not in said(stage) | said(stage, dtype="float32")
        assert said(stage, dtype="float16")["head_dtype"] == "float16"
    # Where no row is read, heads are what a search reads of the experts.
    plain: dict[str, Any] = {"regression": {"mode": "module-wise", "lambda": 0.1, "heads": "keep"}, "search": "none"}
    assert "experts" not in said("search", **plain)
    assert "experts" in said("search", **plain, dtype="bfloat16")


def test_only_fitted_heads_of_texts_say_on_which_rows() -> None:
    def said(**values: Any) -> dict[str, Any]:
        done = Result("any", "", "ran", 0.0, dict.fromkeys(("layout", "experts", "anchor"), ""))
        found = Requests(Recipe.from_mapping({**VALUES, **values}), inputs())
        return dict(found.build("search", dict.fromkeys(STAGES, done)).settings)

    assert said(regression={"mode": "propagated"})["head_rows"] == HEAD_ROWS
    assert "head_rows" not in said(regression={"mode": "propagated", "heads": "keep"})
    experts = [{**expert, "task": {**expert["task"], "kind": "image-classification"}} for expert in VALUES["experts"]]
    assert "head_rows" not in said(regression={"mode": "propagated"}, experts=experts)


@pytest.mark.parametrize(
    ("digests", "stages"),
    [
        ({"base": "x"}, EVERYTHING),
        ({"one": "x"}, EVERYTHING),
        ({"one.data": "x"}, EVERYTHING),
        ({"anchor": "x"}, {"anchor", "search", "evaluate", "publish"}),
        ({"base.path": "/moved", "one.path": "/moved", "anchor.path": "/moved"}, set()),
    ],
)
def test_a_change_of_the_inputs_reaches_the_stages_that_depend_on_it(digests: dict[str, str], stages: set[str]) -> None:
    # Layouts and rows are named by the first stage's key here, so everything that reads them follows it.
    assert changed(**digests) == stages


def test_the_settings_of_an_anchor_count_and_the_place_of_a_checkpoint_does_not() -> None:
    assert changed({"anchor": {"method": "checkpoint", "path": "the/same/elsewhere"}}) == set()
    recipe = {**VALUES, "anchor": {"method": "ta"}}
    given = replace(inputs(), anchor=None)
    one = keys(Recipe.from_mapping(recipe), given)
    two = keys(Recipe.from_mapping({**recipe, "anchor": {"method": "ta", "scale": 0.5}}), given)
    assert {stage for stage in STAGES if one[stage] != two[stage]} == {"anchor", "search", "evaluate", "publish"}


@pytest.mark.parametrize("method", ["ta", "regmean", "fisher"])
def test_an_anchor_depends_on_the_statistics_that_it_needs(method: str) -> None:
    recipe = {**VALUES, "anchor": {"method": method}}
    given = replace(inputs(), anchor=None)
    one = keys(Recipe.from_mapping(recipe), given)
    grams = keys(Recipe.from_mapping({**recipe, "grams": {"batch_size": 7}}), given)
    rows = keys(Recipe.from_mapping(recipe), replace(inputs(**{"one.data": "x"}), anchor=None))
    assert (one["anchor"] != grams["anchor"]) == (method == "regmean")
    assert one["anchor"] != rows["anchor"]  # by way of the layout, which this test names by the first stage's key


def test_a_scale_chosen_on_validation_depends_on_what_it_is_measured_with() -> None:
    given = replace(inputs(), anchor=None)

    def anchor(scale: Any, scales: list[float], batch_size: int) -> str:
        chosen = {"method": "ta", "scale": scale, "scales": scales}
        recipe = {**VALUES, "anchor": chosen, "evaluation": {"batch_size": batch_size}}
        return keys(Recipe.from_mapping(recipe), given)["anchor"]

    assert anchor(0.3, [0.1], 64) == anchor(0.3, [0.2], 7)
    assert len({anchor("validation", [0.1], 64), anchor("validation", [0.2], 64), anchor("validation", [0.1], 7)}) == 3


def test_the_experts_places_count_where_a_method_draws_by_them() -> None:
    def places(**changes: Any) -> tuple[bool, bool]:
        recipe = {**VALUES, "anchor": {"method": "ta"}, **changes}
        given = replace(inputs(), anchor=None)
        one = keys(Recipe.from_mapping(recipe), given)
        turned = {**recipe, "experts": recipe["experts"][::-1]}
        two = keys(Recipe.from_mapping(turned), replace(given, experts=given.experts[::-1]))
        assert one["grams"] == two["grams"]
        return one["anchor"] != two["anchor"], one["evaluate"] != two["evaluate"]

    assert places() == (False, False)
    assert places(anchor={"method": "dare"}) == (True, True)
    assert places(evaluation={"compare": ["ta", "dare"]}) == (False, True)


def test_there_is_no_other_stage() -> None:
    with pytest.raises(ValueError, match="no stage 'bake'"):
        Requests(Recipe.from_mapping(VALUES), inputs()).build("bake", {})


def test_the_folder_of_slurm_s_logs_lies_beside_the_recipe(tmp_path: Path) -> None:
    recipe = Recipe.from_mapping({**VALUES, "cluster": {"slurm": {"logs": "logs"}}}, folder=tmp_path)
    results = {"experts": Result("experts", "key", "ran", 0.0, {"experts": {}, "layout": "layout"})}
    asked = Requests(recipe, inputs()).build("grams", results)
    assert asked.where["cluster"]["slurm"]["logs"] == str(tmp_path / "logs")
