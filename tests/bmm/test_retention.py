"""What goes and what stays, as a function of a listing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from bmm.reachable import Origins
from bmm.retention import Retention, choose
from bmm.store import Entry

NOW = 1e9
DAY = 86400.0


def entry(kind: str, key: str, *, size: int = 1, age: float = 0.0, **manifest: Any) -> Entry:
    """An artefact that was last used so many days ago."""
    used = NOW - age * DAY
    return Entry(kind, key, size, used, used, Path(kind, key), {"digest": f"of-{key}", **manifest})


def names(entries: list[Entry]) -> set[tuple[str, str]]:
    return {(one.kind, one.key) for one in entries}


entries_ = st.lists(
    st.builds(
        lambda kind, key, size, age, parent: entry(
            kind, str(key), size=size, age=age, made_from={"inputs": [f"of-{parent}"]}
        ),
        st.sampled_from(["run", "model", "grams"]),
        st.integers(0, 12),
        st.integers(0, 100),
        st.floats(0, 60),
        st.integers(0, 12),
    ),
    max_size=14,
    unique_by=lambda one: (one.kind, one.key),
)
retentions = st.builds(
    Retention,
    older_than_days=st.none() | st.floats(0, 60),
    keep_runs=st.none() | st.integers(0, 4),
    max_bytes=st.none() | st.integers(0, 500).map(lambda size: f"{size}B"),
)


@settings(max_examples=50, deadline=None)
@given(
    entries_, retentions, st.sets(st.tuples(st.sampled_from(["run", "model", "grams"]), st.integers(0, 12).map(str)))
)
def test_the_protected_stay_and_each_limit_holds_for_the_rest(
    entries: list[Entry], retention: Retention, protected: set[tuple[str, str]]
) -> None:
    going = choose(entries, retention, protected, NOW)
    gone = names([one.entry for one in going])
    assert len(gone) == len(going)
    assert not gone & protected
    staying = [one for one in entries if (one.kind, one.key) not in gone]
    free = [one for one in staying if (one.kind, one.key) not in protected]
    if retention.older_than_days is not None:
        assert all(one.used >= NOW - retention.older_than_days * DAY for one in free)
    if retention.keep_runs is not None:
        # The last runs stay, and what they were made from: that may be a run too.
        runs = sorted((one for one in entries if one.kind == "run"), key=lambda one: (one.used, one.key), reverse=True)
        kept = Origins(entries).of([(one.kind, one.key) for one in runs[: retention.keep_runs]])
        assert {(one.kind, one.key) for one in free if one.kind == "run"} <= kept
    if retention.limit is not None and sum(one.bytes for one in staying) > retention.limit:
        assert free == []
    # What was used longest ago goes first, and nothing goes that no limit asks for.
    by_bytes = [one.entry for one in going if one.why == "bytes"]
    assert all(one.used <= other.used for one in by_bytes for other in free)
    if by_bytes and retention.limit is not None:
        assert sum(one.bytes for one in staying) + by_bytes[-1].bytes > retention.limit
    if retention == Retention():
        assert going == []


def test_the_last_runs_keep_what_they_share_with_older_ones() -> None:
    entries = [
        entry("grams", "shared", age=9),
        entry("grams", "old", age=9),
        entry("model", "a", age=5, made_from={"inputs": {"grams": ["of-shared", "of-old"]}}),
        entry("model", "b", age=1, made_from={"inputs": {"grams": "of-shared"}}),
        entry("run", "a", age=5, made_from={"model": {"kind": "model", "key": "a", "digest": "of-a"}}),
        entry("run", "b", age=1, made_from={"model": {"kind": "model", "key": "b", "digest": "of-b"}}),
        entry("grams", "unfinished", age=40),
    ]
    going = choose(entries, Retention(keep_runs=1), set(), NOW)
    assert names([one.entry for one in going]) == {("grams", "old"), ("model", "a"), ("run", "a")}
    assert {one.why for one in going} == {"runs"}
    assert {one.entry.key for one in choose(entries, Retention(older_than_days=30), set(), NOW)} == {"unfinished"}


def test_what_was_asked_for_on_the_way_is_an_origin_too() -> None:
    entries = [
        entry("walk", "w"),
        entry("search", "s", provenance={"used": [{"kind": "walk", "key": "w"}, {"kind": "walk", "key": "gone"}]}),
        entry("model", "m", made_from={"inputs": {"search": {"kind": "search", "key": "s", "digest": "of-s"}}}),
        entry("model", "other"),
        entry("run", "r", made_from={"inputs": {"model": {"kind": "model", "key": "m"}, "records": {}}}),
    ]
    origins = Origins(entries)
    assert origins.of([("model", "m"), ("model", "nowhere")]) == {("model", "m"), ("search", "s"), ("walk", "w")}
    assert origins.of_models(["of-m"]) == {("run", "r"), ("model", "m"), ("search", "s"), ("walk", "w")}
    assert origins.of_models(["of-s", "nothing"]) == set()


@pytest.mark.parametrize(
    "manifest", [{}, {"digest": 3}, {"made_from": [[["of-x"]]], "provenance": []}, {"made_from": None}]
)
def test_a_manifest_that_says_nothing_sensible_reaches_nothing(manifest: dict[str, Any]) -> None:
    one = Entry("model", "x", 1, NOW, NOW, Path("x"), manifest)
    assert Origins([one]).of([("model", "x")]) == {("model", "x")}


@pytest.mark.parametrize("wrong", [{"max_bytes": "many"}, {"keep_runs": -1}, {"older_than_days": -1}, {"count": 3}])
def test_a_limit_that_is_none_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Retention(**wrong)
