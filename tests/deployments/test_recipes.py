"""Every recipe that is offered is whole: it holds offline, says what it reproduces, and is what its facts say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from stand_ins import stand_in

import bmm
from bmm.offline import check_offline, estimate_offline, known_config
from bmm.plan import make_plan, require_fit
from bmm.recipe import Recipe
from bmm.sources import fingerprint_inputs
from bmm.store import Store

DEPLOYMENTS = Path(__file__).resolve().parents[2] / "deployments"
RECIPES = sorted((DEPLOYMENTS / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_each_recipe_holds_offline(path: Path) -> None:
    recipe = Recipe.from_yaml(path)
    found = check_offline(recipe)
    # Nothing is doubtful but that no revision is pinned.
    assert [line for line in found.warnings if "without a revision" not in line] == []
    assert "0 models" not in "\n".join(found.checked)
    head = path.read_text(encoding="utf-8").partition("\nbase_model:")[0]
    assert "ublished" in head
    assert f"bmm plan --offline deployments/recipes/{path.name}" in head
    assert recipe.output == f"./merged/{path.stem}"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_each_recipe_has_a_configuration_and_workers_with_room(path: Path) -> None:
    recipe = Recipe.from_yaml(path)
    config = known_config(recipe)
    assert config is not None
    stages, output_bytes = estimate_offline(recipe, config)
    assert all(stage.memory_bytes > 0 for stage in stages)
    assert output_bytes > 10**8


def test_the_clip_recipes_are_what_their_facts_say() -> None:
    subprocess.run([sys.executable, str(DEPLOYMENTS / "clip_recipes.py"), "--check"], check=True)


# Every task and each architecture once; the three tables of an architecture differ in their tasks alone.
RUNS = {
    "clip-b32-8": (0, 7),
    "clip-b32-14": (8, 11),
    "clip-b32-20": (14, 19),
    "clip-b16-8": (3, 4),
    "clip-b16-14": (9, 10),
    "clip-b16-20": (15, 17),
    "clip-l14-8": (5, 6),
    "clip-l14-14": (12, 13),
    "clip-l14-20": (16, 18),
    "gpt2-glue-7": (0, 1),
    "llama-3.2-3b-5": (1, 4),
}


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_each_recipe_runs_on_pico_stand_ins(path: Path, tmp_path: Path, in_process: None) -> None:
    recipe = Recipe.from_yaml(stand_in(path, tmp_path, RUNS[path.stem]))
    planned = make_plan(recipe, fingerprint_inputs(recipe), Store.open(tmp_path / "store"))
    require_fit(planned, recipe)
    config = known_config(recipe)
    assert config is not None
    assert estimate_offline(recipe, config) == (planned.stages, planned.output_bytes)
    merge = bmm.merge(recipe, store=tmp_path / "store")
    assert merge.document["metrics"]["test"].keys() == {*(expert.name for expert in recipe.experts), "mean"}
    trials = merge.document["search"]["trials"]
    assert len(trials) == 2
    assert [trial["reason"] for trial in trials] == [None, None]
    # The first is the anchor; the second has regressed weights, whichever of them was the better one here.
    assert all(setting["lambda"] is not None for setting in trials[1]["settings"].values())
    assert {entry["module"] for entry in merge.document["coverage"]} != {None}
