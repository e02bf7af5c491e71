"""Gram matrices from task vectors, blended and from elsewhere, in whole merges of pico experts."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bmm.errors import RecipeError
from bmm.grams.published import publish
from bmm.grams.store import GramReader
from bmm.pipeline import perform_here, run_stages
from bmm.recipe import Recipe
from bmm.sources import fingerprint_inputs
from bmm.stages.registry import STAGES
from bmm.stages.request import Result
from bmm.store import Store

Edit = Callable[..., Path]
ORDER = tuple(STAGES)
VECTORS = {"source": "task-vectors"}


def stages(folder: Path, last: str, store: str = "store") -> dict[str, Result]:
    recipe = Recipe.from_yaml(folder / "recipe.yaml")
    upto = ORDER[: ORDER.index(last) + 1]
    return run_stages(recipe, fingerprint_inputs(recipe), Store.open(folder / store), perform_here, upto)


def reader(folder: Path, result: Result, expert: str, store: str = "store") -> GramReader:
    return GramReader(Store.open(folder / store).read(result.reference("experts", expert)).file("grams.zarr"))


def maps(folder: Path, result: Result) -> dict[str, list[str]]:
    modules = Store.open(folder / "store").read(result.reference("layout")).read_json("modules.json")["maps"]
    groups: dict[str, list[str]] = {}
    for map_ in modules:
        groups.setdefault(map_["input_group"], []).append(f"{map_['module']}.weight")
    return groups


def made(folder: Path) -> Counter[str]:
    return Counter(entry.kind for entry in Store.open(folder / "store").entries())


def estimates(folder: Path, expert: str, groups: dict[str, list[str]]) -> dict[str, torch.Tensor]:
    base = load_file(folder / "base" / "model.safetensors")
    tuned = load_file(folder / "experts" / expert / "model.safetensors")
    found = {}
    for group, names in groups.items():
        stacked = torch.cat([tuned[f"bert.{name}"].double() - base[name].double() for name in names])
        found[group] = stacked.T @ stacked / stacked.square().sum()
    return found


def test_grams_of_task_vectors_depend_on_base_and_expert_alone(merged: Path, edit_recipe: Edit) -> None:
    edit_recipe(merged, grams=VECTORS)
    first = stages(merged, "grams")
    groups = maps(merged, first["experts"])
    assert max(len(names) for names in groups.values()) == 3
    for expert in ("task0", "task2"):
        grams = reader(merged, first["grams"], expert)
        for group, wanted in estimates(merged, expert, groups).items():
            torch.testing.assert_close(grams.gram(group), wanted, rtol=1e-9, atol=1e-12)
            assert grams.rows(group) == 16 * len(groups[group]) or "intermediate" in group
    count = made(merged)["grams"]
    # Other rows and another cut of the work change nothing; another expert changes its own matrices.
    data = merged / "data" / "task1" / "calibration.jsonl"
    data.write_text("".join(data.read_text(encoding="utf-8").splitlines(keepends=True)[:40]), encoding="utf-8")
    again = stages(merged, "grams")
    assert again["experts"].state == "ran"
    assert (again["grams"].state, again["grams"].key) == ("cached", first["grams"].key)
    file = merged / "experts" / "task1" / "model.safetensors"
    save_file({name: 1.01 * tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    changed = stages(merged, "grams")["grams"]
    assert changed.state == "ran"
    assert made(merged)["grams"] == count + 1
    assert changed.reference("experts", "task0") == first["grams"].reference("experts", "task0")


def test_a_merge_on_grams_of_task_vectors_is_the_closed_form_and_reports_its_maps(
    merged: Path, edit_recipe: Edit
) -> None:
    edit_recipe(merged, grams=VECTORS, search={"trials": 2})
    results = stages(merged, "search")
    search = Store.open(merged / "store").read(results["search"].reference("search"))
    published = load_file(search.file("model.safetensors"))
    anchor = load_file(
        Store.open(merged / "store").read(results["anchor"].reference("anchor")).file("model.safetensors")
    )
    base = load_file(merged / "base" / "model.safetensors")
    experts = [load_file(merged / "experts" / f"task{i}" / "model.safetensors") for i in range(3)]
    groups = maps(merged, results["experts"])
    group_of = {name: group for group, names in groups.items() for name in names}
    grams = [estimates(merged, f"task{i}", groups) for i in range(3)]
    regressed = 0
    for entry in search.read_json("coverage.json"):
        name = entry["parameter"]
        if entry["treatment"] != "regressed":
            assert torch.equal(published[name], anchor[name]), name
            continue
        regressed += 1
        assert not name.endswith("bias")
        parts = [part[group_of[name]] for part in grams]
        total, prior = sum(parts), anchor[name].double()
        size = total.shape[0]  # type: ignore[union-attr]
        matrix = total + entry["lambda"] * total.trace() / size * torch.eye(size, dtype=torch.float64)  # type: ignore[union-attr]
        pull = sum((e[f"bert.{name}"].double() - prior) @ part for e, part in zip(experts, parts, strict=True))
        mean = prior + torch.linalg.solve(matrix, pull, left=False)  # type: ignore[arg-type]
        assert entry["condition"] == pytest.approx(float(torch.linalg.cond(matrix)), rel=1e-3)
        wanted = base[name].double() + entry["gamma"] * (mean - base[name].double())
        torch.testing.assert_close(published[name].double(), wanted, rtol=1e-4, atol=1e-6)
    best = search.read_json("search.json")["best"]["settings"]
    assert regressed == (13 if best["qkv"]["lambda"] is not None else 0)


def test_a_hybrid_blends_the_artefacts_of_both_sources(merged: Path, edit_recipe: Edit, in_process: None) -> None:
    activations = stages(merged, "grams")["grams"]
    assert activations.state == "cached"
    edit_recipe(merged, grams=VECTORS)
    vectors = stages(merged, "grams")["grams"]
    edit_recipe(merged, grams={"source": "hybrid", "rho": 0.3, "shard_rows": 24})
    before = made(merged)
    hybrid = stages(merged, "grams")["grams"]
    # Both parents are taken from the store as they are.
    assert made(merged) - before == Counter({"grams": 3, "stage-grams": 1})
    one, two, three = (reader(merged, result, "task1") for result in (activations, vectors, hybrid))
    for name in one.names():
        G, E = one.gram(name), two.gram(name)
        wanted = G.trace() * (0.3 * G / G.trace() + 0.7 * E / E.trace())
        torch.testing.assert_close(three.gram(name), wanted, rtol=1e-9, atol=1e-12)
        assert three.rows(name) == one.rows(name)
    edit_recipe(merged, grams={"source": "hybrid", "rho": 0.4, "shard_rows": 24})
    assert stages(merged, "grams")["grams"].state == "ran"


@pytest.fixture
def elsewhere(merged: Path, tmp_path: Path) -> Path:
    """The pico experts' Gram matrices, published from the store in which they were made."""
    result = stages(merged, "grams")["grams"]
    for expert in ("task0", "task1", "task2"):
        publish(Store.open(merged / "store").read(result.reference("experts", expert)), tmp_path / "grams" / expert)
    return tmp_path / "grams"


@pytest.mark.parametrize("single", [True, False])
def test_published_grams_make_the_same_merge_in_another_store(
    merged: Path, elsewhere: Path, edit_recipe: Edit, single: bool
) -> None:
    edit_recipe(merged, regression={"mode": "module-wise"}, search={"trials": 2})
    here = stages(merged, "search")
    path = str(elsewhere) if single else {f"task{i}": str(elsewhere / f"task{i}") for i in range(3)}
    edit_recipe(merged, regression=None, grams={"source": "artifact", "path": path})
    there = stages(merged, "search", store="another")
    for expert in ("task0", "task1", "task2"):
        name = ("experts", expert)
        assert there["grams"].reference(*name).digest == here["grams"].reference(*name).digest
    assert there["search"].reference("search").digest == here["search"].reference("search").digest
    # The folder may move, or vanish, once its matrices are in the store.
    moved = elsewhere.rename(elsewhere.with_name("moved"))
    edit_recipe(merged, grams={"source": "artifact", "path": str(moved)})
    assert stages(merged, "search", store="another")["search"].state == "cached"


def test_grams_of_another_expert_or_another_architecture_are_refused(
    merged: Path, elsewhere: Path, edit_recipe: Edit
) -> None:
    edit_recipe(merged, grams={"source": "artifact", "path": str(elsewhere)})
    shutil.rmtree(elsewhere / "task2")
    with pytest.raises(RecipeError, match="the Gram matrices of task2: there is no folder"):
        stages(merged, "grams", store="another")
    shutil.copytree(elsewhere / "task1", elsewhere / "task2")
    with pytest.raises(RecipeError, match=r"of task2: .* was made from another expert .*; publish it again"):
        stages(merged, "grams", store="another")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pooler.dense": None}, "has no matrix for the input of pooler.dense"),
        ({"pooler.dense": 15}, "has a matrix of size 15 for the input of pooler.dense, which has 16 features"),
    ],
)
def test_grams_that_do_not_cover_the_maps_are_refused(
    merged: Path, elsewhere: Path, edit_recipe: Edit, change: dict[str, int | None], said: str
) -> None:
    from bmm.grams.collect import GramSum
    from bmm.grams.store import write
    from bmm.store import Draft

    whole = GramReader(elsewhere / "task0" / "grams.zarr")

    def make(draft: Draft) -> None:
        sums: dict[str, Any] = {name: whole.sum(name) for name in whole.names()}
        for name, size in change.items():
            sums[name] = None if size is None else GramSum(torch.eye(size, dtype=torch.float64), 1)
        write(draft.path / "grams.zarr", [(name, part) for name, part in sums.items() if part is not None], {})

    other = Store.open(merged / "third")
    reference, _ = other.obtain("grams", "0" * 64, make)
    paths = {"task0": str(other.read(reference).path), **{f"task{i}": str(elsewhere / f"task{i}") for i in (1, 2)}}
    edit_recipe(merged, grams={"source": "artifact", "path": paths})
    with pytest.raises(RecipeError, match=f"the Gram matrices of task0: .* {said}"):
        stages(merged, "grams", store="another")
