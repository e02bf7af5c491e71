from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bmm.stages.request import Request, Result, Stage, Work, perform, recorded, verified
from bmm.store import Store

REQUEST = Request("bake", {"flour": "digest"}, {"heat": 200}, {"oven": "/kitchen"})


def bake(work: Work, request: Request) -> dict[str, Any]:
    first = work.obtain("bread", request.inputs, lambda draft: draft.write_json("a.json", 1), settings=request.settings)
    second = work.obtain("crumbs", request.inputs, lambda draft: draft.write_json("b.json", 2))
    return {"bread": first.to_json(), "crumbs": {"many": second.to_json()}}


def never() -> Stage:
    raise AssertionError("the stage was loaded")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path)


def test_a_stage_runs_once_and_is_then_known_without_being_loaded(store: Store) -> None:
    first = perform(lambda: bake, store, REQUEST)
    assert (first.stage, first.state, first.key) == ("bake", "ran", REQUEST.key)
    second = perform(never, store, REQUEST)
    assert second.state == "cached"
    assert second.outputs == first.outputs
    assert recorded(store, REQUEST) is not None
    assert store.read(first.reference("crumbs", "many")).read_json("b.json") == 2


def test_the_key_leaves_out_where_things_are(store: Store) -> None:
    perform(lambda: bake, store, REQUEST)
    elsewhere = Request("bake", REQUEST.inputs, REQUEST.settings, {"oven": "/elsewhere"})
    assert perform(never, store, elsewhere).state == "cached"
    for other in (
        Request("fry", REQUEST.inputs, REQUEST.settings),
        Request("bake", {"flour": "other"}, REQUEST.settings),
        Request("bake", REQUEST.inputs, {"heat": 100}),
    ):
        assert recorded(store, other) is None


@pytest.mark.parametrize("kind", ["bread", "crumbs", "stage-bake"])
def test_a_lost_artefact_makes_the_stage_run_again(store: Store, kind: str) -> None:
    first = perform(lambda: bake, store, REQUEST)
    (entry,) = [entry for entry in store.entries() if entry.kind == kind]
    assert store.discard(entry.kind, entry.key)
    assert recorded(store, REQUEST) is None
    again = perform(lambda: bake, store, REQUEST)
    # Only the record was lost: nothing had to be made.
    assert again.state == ("cached" if kind == "stage-bake" else "ran")
    assert again.outputs == first.outputs
    assert verified(store, again)


def test_a_damaged_artefact_fails_verification(store: Store) -> None:
    result = perform(lambda: bake, store, REQUEST)
    assert verified(store, result)
    store.read(result.reference("crumbs", "many")).file("b.json").write_text("3")
    assert not verified(store, result)
    assert recorded(store, REQUEST) is None


def test_fresh_runs_what_is_recorded(store: Store) -> None:
    perform(lambda: bake, store, REQUEST)
    assert perform(lambda: bake, Store.open(store.root, fresh=True), REQUEST).state == "ran"


def test_a_stage_that_fails_leaves_no_record(store: Store) -> None:
    def fail(work: Work, request: Request) -> dict[str, Any]:
        bake(work, request)
        raise RuntimeError("burnt")

    with pytest.raises(RuntimeError, match="burnt"):
        perform(lambda: fail, store, REQUEST)
    assert recorded(store, REQUEST) is None
    # What it had finished is not made again.
    assert perform(lambda: bake, store, REQUEST).state == "cached"


def test_requests_and_results_survive_json(store: Store) -> None:
    assert Request.from_json(json.loads(json.dumps(REQUEST.to_json()))) == REQUEST
    result = perform(lambda: bake, store, REQUEST)
    assert Result.from_json(json.loads(json.dumps(result.to_json()))) == result


def test_a_cached_stage_counts_as_used(store: Store) -> None:
    import os

    perform(lambda: bake, store, REQUEST)
    for entry in store.entries():
        os.utime(entry.path / "manifest.json", (1000, 1000))
    perform(never, store, REQUEST)
    assert all(entry.used > 2000 for entry in store.entries())
