from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from bmm.errors import OutputError, RecipeError
from bmm.grams.published import PublishedGrams
from bmm.pipeline import STAGES
from bmm.plan import Plan, cached_results, make_plan, require_fit
from bmm.recipe import Recipe
from bmm.sources import fingerprint_inputs
from bmm.store import Store

Edit = Callable[..., Path]


def plan(folder: Path, *, fresh: bool = False) -> tuple[Plan, Recipe]:
    recipe = Recipe.from_yaml(folder / "recipe.yaml")
    return make_plan(recipe, fingerprint_inputs(recipe), Store.open(folder / "store", fresh=fresh)), recipe


def cached(folder: Path, *, fresh: bool = False) -> list[str]:
    return [stage.stage for stage in plan(folder, fresh=fresh)[0].stages if stage.cached]


def test_nothing_is_cached_before_the_first_merge_and_planning_writes_nothing(pico: Path) -> None:
    before = sorted(pico.rglob("*"))
    made, recipe = plan(pico)
    require_fit(made, recipe)
    assert [stage.stage for stage in made.stages] == list(STAGES)
    assert not [stage for stage in made.stages if stage.cached]
    assert made.disk_bytes > 0
    tensors = load_file(pico / "base" / "model.safetensors").values()
    assert made.output_bytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert sorted(pico.rglob("*")) == before


def test_what_is_finished_is_cached_up_to_the_first_change(merged: Path, edit_recipe: Edit) -> None:
    made, _ = plan(merged)
    assert [stage.stage for stage in made.stages if stage.cached] == list(STAGES)
    assert (made.disk_bytes, made.memory_bytes) == (0, 0)
    assert cached(merged, fresh=True) == []
    edit_recipe(merged, search={"trials": 6})
    assert cached(merged) == ["experts", "task-vectors", "grams", "anchor"]
    edit_recipe(merged, search={"trials": 5}, anchor={"method": "ta"})
    assert cached(merged) == ["experts", "task-vectors", "grams"]


def test_a_lost_artefact_is_not_cached(merged: Path) -> None:
    recipe = Recipe.from_yaml(merged / "recipe.yaml")
    store = Store.open(merged / "store")
    results = cached_results(recipe, fingerprint_inputs(recipe), store)
    assert list(results) == list(STAGES)
    reference = results["grams"].reference("experts", "task1")
    assert store.discard(reference.kind, reference.key)
    assert cached(merged) == ["experts", "task-vectors"]


def test_the_plan_says_what_a_person_asks(pico: Path) -> None:
    document = plan(pico)[0].to_json()
    assert [stage["stage"] for stage in document["stages"]] == list(STAGES)
    assert "2 workers" in next(stage for stage in document["stages"] if stage["stage"] == "grams")["note"]
    assert document["disk_bytes"] == sum(stage["disk_bytes"] for stage in document["stages"])
    assert document["free"]["memory"] > 0


@pytest.mark.parametrize(
    ("grams", "said"),
    [
        ({"source": "task-vectors"}, "no data"),
        ({"source": "artifact", "path": "experts"}, "made elsewhere"),
        ({"source": "hybrid"}, "2 workers"),
    ],
)
def test_grams_that_need_no_worker_plan_none(
    pico: Path, edit_recipe: Edit, grams: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bmm.sources.find", lambda folder, _: PublishedGrams(str(folder), "0" * 64))
    edit_recipe(pico, grams=grams, cluster={"memory_limit": "100MiB"})
    made, recipe = plan(pico)
    stage = next(stage for stage in made.stages if stage.stage == "grams")
    assert said in stage.note
    assert stage.disk_bytes > 0
    if grams["source"] == "hybrid":
        with pytest.raises(RecipeError, match="memory_limit"):
            require_fit(made, recipe)
    else:
        require_fit(made, recipe)


def test_a_full_store_is_refused(pico: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bmm.disk.shutil.disk_usage", lambda _: SimpleNamespace(free=2048))
    made, recipe = plan(pico)
    with pytest.raises(OutputError, match=r"the store .* but its disk is full but for 2 KiB; name another disk"):
        require_fit(made, recipe)


def test_a_full_output_is_refused(pico: Path) -> None:
    made, recipe = plan(pico)
    with pytest.raises(OutputError, match=r"the output .*merged needs .* name another folder with 'output'"):
        require_fit(replace(made, output_free=0), recipe)


def test_too_little_memory_is_refused(pico: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bmm.plan.psutil.virtual_memory", lambda: SimpleNamespace(total=2**29))
    made, recipe = plan(pico)
    with pytest.raises(RecipeError, match=r"the stage 'search' needs .* of memory, this machine has 512 MiB; lower"):
        require_fit(made, recipe)


def test_a_worker_with_too_little_memory_is_refused(pico: Path, edit_recipe: Edit) -> None:
    edit_recipe(pico, cluster={"memory_limit": "100MiB"})
    made, recipe = plan(pico)
    with pytest.raises(RecipeError, match=r"'cluster.memory_limit' is 100 MiB, but a worker of .* needs .*; raise"):
        require_fit(made, recipe)


def test_the_worst_shortage_is_named_and_finished_stages_need_nothing(merged: Path, edit_recipe: Edit) -> None:
    edit_recipe(merged, cluster={"memory_limit": "100MiB", "workers": 1})
    made, recipe = plan(merged)
    require_fit(replace(made, memory_total=1, store_free=0, output_free=made.output_bytes), recipe)
    stages = tuple(
        replace(stage, cached=False, disk_bytes=100, memory_bytes=2**30, worker_bytes=2**30) for stage in made.stages
    )
    needy = replace(made, stages=stages, memory_total=2**40, store_free=2**40)
    with pytest.raises(RecipeError, match="memory_limit"):
        require_fit(needy, recipe)
    with pytest.raises(OutputError, match="the store"):
        require_fit(replace(needy, store_free=1), recipe)
    with pytest.raises(RecipeError, match="of memory"):
        require_fit(replace(needy, memory_total=1, store_free=1), recipe)
