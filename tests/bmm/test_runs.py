"""The record of a finished merge, and what it keeps from being pruned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bmm.errors import ArtefactDamagedError
from bmm.pipeline import STAGES, merge
from bmm.pruning import prune
from bmm.recipe import Recipe
from bmm.retention import Retention
from bmm.runs import read_run
from bmm.store import Store


@pytest.fixture
def store(merged: Path) -> Store:
    """The store of a finished merge."""
    return Store.open(merged / "store")


def test_a_merge_is_written_down_once_and_in_the_recipes_order(merged: Path, store: Store) -> None:
    again = merge(Recipe.from_yaml(merged / "recipe.yaml"), store=store.root)
    (key,) = store.keys("run")
    assert again.record is not None
    assert again.record.key == key
    run = read_run(store, again.record)
    assert run.model == again.results["publish"].reference("model")
    # As it was when the work was done; a cached merge adds nothing.
    assert {stage["state"] for stage in run.document["stages"].values()} == {"ran"}
    kept = (store.read(again.record).path / "merge.json").read_text(encoding="utf-8")
    assert kept == json.dumps(run.document, indent=1, ensure_ascii=False) + "\n"
    assert list(run.document["metrics"]["test"]) == ["task0", "task1", "task2", "mean"]


def test_a_champion_keeps_its_whole_merge_so_that_it_is_not_computed_again(merged: Path, store: Store) -> None:
    # Everything of this merge, and nothing else.
    before = {(entry.kind, entry.key) for entry in store.entries()}
    store.obtain("grams", "0" * 64, lambda draft: draft.write_json("other.json", 1))
    model = store.find("model", store.keys("model")[0])
    assert model is not None
    pruned = prune(store, Retention(older_than_days=0), {model.digest})
    assert [one.entry.key for one in pruned.going] == ["0" * 64]
    assert {(entry.kind, entry.key) for entry in store.entries()} == before
    assert {f"stage-{stage}" for stage in STAGES} | {"run", "walk", "predictions"} <= {kind for kind, _ in before}
    again = merge(Recipe.from_yaml(merged / "recipe.yaml"), store=store.root)
    assert {result.state for result in again.results.values()} == {"cached"}


def test_a_record_that_is_gone_is_told(merged: Path, store: Store) -> None:
    record = store.find("run", store.keys("run")[0])
    assert record is not None
    assert store.discard("run", record.key)
    with pytest.raises(ArtefactDamagedError, match="run artefact"):
        read_run(store, record)
