"""The walk's artefacts: one a layer, taken up where a killed run stopped, to the same bytes."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bmm.cluster.connection import Cluster
from bmm.errors import RecipeError
from bmm.pipeline import perform_here, run_stages
from bmm.recipe import Recipe
from bmm.regression.moments import Moments
from bmm.sources import fingerprint_inputs
from bmm.stages import walk_part, walker
from bmm.store import Entry, Store

UPTO_SEARCH = ("experts", "task-vectors", "grams", "anchor", "search")


def search(folder: Path) -> Path:
    recipe = Recipe.from_yaml(folder / "recipe.yaml")
    store = Store.open(folder / "store")
    results = run_stages(recipe, fingerprint_inputs(recipe), store, perform_here, UPTO_SEARCH)
    return store.read(results["search"].reference("search")).path


def walked(folder: Path) -> dict[str, Entry]:
    """The walk's artefacts in the order in which they were made."""
    entries = [entry for entry in Store.open(folder / "store").entries() if entry.kind == "walk"]
    return {entry.key: entry for entry in sorted(entries, key=lambda entry: entry.made)}


def test_every_layer_and_the_pooler_leave_an_artefact(merged: Path) -> None:
    assert len(walked(merged)) == 3


@pytest.mark.parametrize("lost", [1, 2, 3])
def test_a_walk_goes_on_where_it_stopped_to_the_same_bytes(merged: Path, lost: int) -> None:
    store = Store.open(merged / "store")
    before = (search(merged) / "model.safetensors").read_bytes()
    made = walked(merged)
    moments = {key: (entry.path / "moments.safetensors").read_bytes() for key, entry in made.items()}
    gone = list(made)[-lost:]
    for entry in store.entries():
        if entry.key in gone or entry.kind in ("search", "stage-search"):
            assert store.discard(entry.kind, entry.key)
    assert (search(merged) / "model.safetensors").read_bytes() == before
    again = walked(merged)
    assert again.keys() == made.keys()
    for key, entry in again.items():
        assert (entry.path / "moments.safetensors").read_bytes() == moments[key]
        assert (entry.made == made[key].made) == (key not in gone)


def test_only_the_walk_depends_on_its_reference(merged: Path, edit_recipe: Callable[..., Path]) -> None:
    search(merged)
    first = walked(merged)
    edit_recipe(merged, search={"per": "model", "trials": 3})
    search(merged)
    assert walked(merged).keys() == first.keys()
    edit_recipe(merged, search={"per": "model", "trials": 3}, regression={"walk_lambda": 1.0})
    search(merged)
    assert len(walked(merged)) == 2 * len(first)


@pytest.mark.slow
def test_the_walk_gives_the_same_bytes_in_workers_and_here(
    merged: Path, edit_recipe: Callable[..., Path], dask_scheduler: str
) -> None:
    before = {key: (entry.path / "moments.safetensors").read_bytes() for key, entry in walked(merged).items()}
    store = Store.open(merged / "store")
    for entry in store.entries():
        if entry.kind in ("walk", "search", "stage-search"):
            assert store.discard(entry.kind, entry.key)
    edit_recipe(merged, cluster={"scheduler": dask_scheduler})
    search(merged)
    after = {key: (entry.path / "moments.safetensors").read_bytes() for key, entry in walked(merged).items()}
    assert after == before


def test_shares_that_went_on_elsewhere_are_let_go_of(merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {key: (entry.path / "moments.safetensors").read_bytes() for key, entry in walked(merged).items()}
    store = Store.open(merged / "store")
    for entry in store.entries():
        if entry.kind in ("walk", "search", "stage-search"):
            assert store.discard(entry.kind, entry.key)
    kept: list[set[tuple[int, ...]]] = []

    def cut_otherwise_at_first(values: dict[str, Any]) -> list[tuple[Moments, ...]]:
        # As if all shares were this worker's until others come.
        first = not values["done"]
        shares = [(task,) for task in values["tasks"]] if first else [values["tasks"]]
        found = [moments for tasks in shares for moments in walk_part.part_moments({**values, "tasks": tasks})]
        kept.append(set(walk_part._parts))
        return found

    monkeypatch.setattr(walker, "part_moments", cut_otherwise_at_first)
    search(merged)
    after = {key: (entry.path / "moments.safetensors").read_bytes() for key, entry in walked(merged).items()}
    assert after == before
    assert kept[0] == {(0,), (1,), (2,)}
    assert kept[-1] == {(0, 1, 2)}


def test_every_map_may_have_the_strength_that_unseen_rows_ask_for(
    merged: Path, edit_recipe: Callable[..., Path]
) -> None:
    edit_recipe(merged, regression={"lambda": "held-out"}, search={})
    first = set(walked(merged))
    found = search(merged)
    made = [entry for key, entry in walked(merged).items() if key not in first]
    lambdas: dict[str, float] = {}
    for entry in made:
        lambdas |= json.loads((entry.path / "unit.json").read_text())["lambdas"]
    assert len(lambdas) == 13
    assert all(1e-4 <= lam <= 100 for lam in lambdas.values())
    assert len(set(lambdas.values())) > 3
    coverage = {entry["module"]: entry["lambda"] for entry in json.loads((found / "coverage.json").read_text())}
    assert {name: pytest.approx(lam) for name, lam in lambdas.items()} == {name: coverage[name] for name in lambdas}, (
        "each map is published as its own rows asked for"
    )


def test_a_walk_keeps_as_many_tokens_as_the_recipe_says(merged: Path, edit_recipe: Callable[..., Path]) -> None:
    def moments(entries: dict[str, Entry]) -> list[bytes]:
        return [(entry.path / "moments.safetensors").read_bytes() for entry in entries.values()]

    def added(**sample: int) -> dict[str, Entry]:
        known = walked(merged).keys()
        edit_recipe(merged, grams=sample, regression={"lambda": 0.1}, search={}, evaluation={"compare": ["average"]})
        search(merged)
        return {key: entry for key, entry in walked(merged).items() if key not in known}

    plain = walked(merged)
    # No text has more than 16.
    assert moments(added(tokens=16)) == moments(plain)
    few = added(tokens=3, tokens_seed=5)
    assert len(few) == len(plain)
    rows = [json.loads((entry.path / "unit.json").read_text())["rows"] for entry in few.values()]
    assert {tuple(counts) for unit in rows for counts in unit.values()} == {(3 * 48,) * 3, (48,) * 3}


def test_a_second_round_starts_from_what_the_first_has_solved(merged: Path, edit_recipe: Callable[..., Path]) -> None:
    edit_recipe(merged, regression={"lambda": 1.0}, search={})
    first = search(merged)
    once = set(walked(merged))
    edit_recipe(merged, regression={"lambda": 1.0, "rounds": 2}, search={})
    second = search(merged)
    added = set(walked(merged)) - once
    assert len(added) == 3, "the first round is taken from the store"
    name = "encoder.layer.1.output.dense.weight"
    one, two = (load_file(folder / "model.safetensors")[name] for folder in (first, second))
    assert not torch.equal(one, two)
    edit_recipe(merged, regression={"lambda": 1e6, "rounds": 2}, search={})
    stiff = load_file(search(merged) / "model.safetensors")[name]
    edit_recipe(merged, regression={"lambda": 1e6}, search={})
    torch.testing.assert_close(stiff, load_file(search(merged) / "model.safetensors")[name], rtol=1e-3, atol=1e-4)


def test_a_task_that_counts_for_more_is_fitted_better(merged: Path, edit_recipe: Callable[..., Path]) -> None:
    name = "encoder.layer.0.attention.self.query.weight"
    expert = load_file(merged / "experts" / "task0" / "model.safetensors")[f"bert.{name}"]

    def distance(**regression: object) -> float:
        edit_recipe(merged, regression=regression, search={})
        return float((load_file(search(merged) / "model.safetensors")[name] - expert).norm())

    for mode in ({"lambda": 0.01}, {"lambda": 0.01, "mode": "module-wise"}):
        assert distance(**mode, task_weights={"task0": 1000}) < 0.9 * distance(**mode)


def test_weights_are_for_experts_that_there_are(merged: Path, edit_recipe: Callable[..., Path]) -> None:
    edit_recipe(merged, regression={"task_weights": {"nobody": 2}})
    with pytest.raises(RecipeError, match="no expert is called 'nobody'; they are task0"):
        Recipe.from_yaml(merged / "recipe.yaml")


@pytest.mark.slow
def test_a_worker_that_dies_on_the_way_changes_no_byte(
    merged: Path, edit_recipe: Callable[..., Path], dask_scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {key: (entry.path / "moments.safetensors").read_bytes() for key, entry in walked(merged).items()}
    store = Store.open(merged / "store")
    for entry in store.entries():
        if entry.kind in ("walk", "search", "stage-search"):
            assert store.discard(entry.kind, entry.key)
    edit_recipe(merged, cluster={"scheduler": dask_scheduler})
    ask, asked = walker.run_all, []

    def ask_and_kill(cluster: Cluster, *arguments: Any, **options: Any) -> Any:
        asked.append(1)
        if len(asked) == 3:
            # In the middle of the first layer.
            processes = cluster.client.run(os.getpid)
            os.kill(next(iter(processes.values())), signal.SIGKILL)
        return ask(cluster, *arguments, **options)

    monkeypatch.setattr(walker, "run_all", ask_and_kill)
    search(merged)
    assert len(asked) > 3
    assert {key: (entry.path / "moments.safetensors").read_bytes() for key, entry in walked(merged).items()} == before


def test_a_worker_that_sums_for_one_walk_does_not_wait_to_forget_another(
    merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.open(merged / "store")
    for entry in store.entries():
        if entry.kind in ("walk", "search", "stage-search"):
            assert store.discard(entry.kind, entry.key)
    dropped: list[set[str]] = []

    def forgotten_meanwhile(values: dict[str, Any]) -> list[tuple[Moments, ...]]:
        with walk_part._lock:
            # As Dask's event loop does, in the thread that heartbeats come from; it must return.
            walk_part.forget(values["walk"])
        found = walk_part.part_moments(values)
        dropped.append({part.walk for part in walk_part._parts.values()})
        return found

    monkeypatch.setattr(walker, "part_moments", forgotten_meanwhile)
    search(merged)
    assert dropped
    assert not any(dropped)
