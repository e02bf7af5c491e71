"""The contract of a store, for every kind of place: what is found, read and listed (making: `test_store_making`)."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_benches import FILES, KEY, Bench, drafts, fill, refuse

from bmm.errors import ArtefactDamagedError
from bmm.store import Draft, Reference, Store, artefact_key, default_location
from bmm.stores.manifest import MANIFEST


def test_an_artefact_is_made_once_and_read_back(bench: Bench, store: Store) -> None:
    assert store.find("thing", KEY) is None
    reference, cached = store.obtain("thing", KEY, fill, describe={"inputs": ["x"]})
    assert not cached
    assert store.obtain("thing", KEY, refuse) == (reference, True)
    assert store.find("thing", KEY) == reference
    artefact = bench.open().read(reference)
    assert artefact.read_json("value.json") == {"b": 1, "a": [1.5, None, "é"]}
    assert artefact.file("deep/er/bytes.bin").read_bytes() == bytes(range(200))
    assert artefact.provenance["note"] == "made in a test"
    assert artefact.manifest["made_from"] == {"inputs": ["x"]}
    assert set(artefact.manifest["files"]) == {"value.json", "deep/er/bytes.bin"}
    assert Reference.from_json(json.loads(json.dumps(reference.to_json()))) == reference


def test_the_key_is_made_of_everything_that_an_artefact_depends_on() -> None:
    keys = {
        artefact_key(kind, version, inputs, how)
        for kind in ("a", "b")
        for version in (1, 2)
        for inputs in ({"x": 1}, {"x": 2}, {"y": 1})
        for how in ({}, {"z": None})
    }
    assert len(keys) == 24
    assert artefact_key("a", 1, {"x": 1, "y": 2}, {}) == artefact_key("a", 1, {"y": 2, "x": 1}, {})


def test_equal_content_has_an_equal_digest_under_whatever_key_it_is_made(bench: Bench, store: Store) -> None:
    references = [store.obtain("thing", key, fill)[0] for key in (KEY, "0" * 64)]
    assert [bench.open().find("thing", key) for key in (KEY, "0" * 64)] == references
    assert references[0].digest == references[1].digest

    def other(draft: Draft) -> None:
        fill(draft)
        draft.write_json("value.json", {"b": 2})

    assert store.obtain("thing", "1" * 64, other)[0].digest != references[0].digest


def test_a_file_under_another_name_is_another_content(store: Store) -> None:
    digests = {
        store.obtain(name.partition(".")[0], KEY, lambda draft, name=name: draft.write_json(name, 1))[0].digest
        for name in ("a.json", "b.json")
    }
    assert len(digests) == 2


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(FILES), where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_is_noticed_and_mended(bench: Bench, store: Store, name: str, where: float, bit: int) -> None:
    reference, _ = store.obtain("thing", KEY, fill)
    content = bytearray(bench.get("thing", KEY, name))
    content[int(where * len(content))] ^= 1 << bit
    bench.put("thing", KEY, name, bytes(content))
    for reader in (store, bench.open()):
        assert reader.find("thing", KEY) is None
        with pytest.raises(ArtefactDamagedError, match=KEY[:12]):
            reader.read(reference)
    made: list[Draft] = []
    again, cached = store.obtain("thing", KEY, lambda draft: (made.append(draft), fill(draft))[1])  # type: ignore[func-returns-value]
    assert (again, cached, len(made)) == (reference, False, 1)
    assert bench.open().find("thing", KEY) == reference


def test_a_number_beyond_its_precision_is_noticed_in_the_manifest(bench: Bench, store: Store) -> None:
    store.obtain("thing", KEY, lambda draft: draft.provenance.update(share=0.1))
    text = bench.get("thing", KEY, MANIFEST)
    assert b'"share": 0.1' in text
    bench.put("thing", KEY, MANIFEST, text.replace(b'"share": 0.1', b'"share": 0.10'))
    assert store.find("thing", KEY) is None


@pytest.mark.parametrize(
    "harm",
    [
        lambda bench: bench.drop("thing", KEY, "value.json"),
        lambda bench: bench.drop("thing", KEY, MANIFEST),
        lambda bench: [bench.drop("thing", KEY, name) for name in reversed(FILES)],
        lambda bench: bench.put("thing", KEY, "deep/er/bytes.bin", bytes(range(100))),
        lambda bench: bench.put("thing", KEY, "deep/er/bytes.bin", bytes(range(201))),
        lambda bench: bench.put("thing", KEY, "value.json", b""),
        lambda bench: bench.put("thing", KEY, MANIFEST, bench.get("thing", KEY, MANIFEST)[:40]),
        lambda bench: bench.put("thing", KEY, MANIFEST, b"[]"),
        lambda bench: bench.put("thing", KEY, MANIFEST, b"{}"),
        lambda bench: bench.put("thing", KEY, MANIFEST, b"\xff\xfe"),
        lambda bench: bench.put("thing", KEY, MANIFEST, b"[" * 100_000),
        lambda bench: bench.put("thing", KEY, "value.json", b"{}"),
    ],
)
def test_what_is_missing_cut_or_swollen_is_noticed_and_mended(bench: Bench, store: Store, harm: Any) -> None:
    reference, _ = store.obtain("thing", KEY, fill)
    harm(bench)
    assert store.find("thing", KEY) is None
    with pytest.raises(ArtefactDamagedError):
        store.read(reference)
    assert store.obtain("thing", KEY, fill) == (reference, False)
    assert store.obtain("thing", KEY, refuse) == (reference, True)
    assert drafts(store) == []


def test_a_manifest_of_another_artefact_does_not_pass(bench: Bench, store: Store) -> None:
    store.obtain("thing", KEY, fill)
    other = artefact_key("thing", 1, {}, {})
    store.obtain("thing", other, lambda draft: draft.write_json("value.json", 0))
    bench.put("thing", other, MANIFEST, bench.get("thing", KEY, MANIFEST))
    assert store.find("thing", other) is None


def test_a_reference_to_what_has_been_replaced_is_refused(store: Store) -> None:
    old, _ = store.obtain("thing", KEY, fill)
    new, cached = store.obtain("thing", KEY, lambda draft: draft.write_json("value.json", 0), replace=True)
    assert not cached
    assert store.read(new).read_json("value.json") == 0
    with pytest.raises(ArtefactDamagedError, match="has been replaced"):
        store.read(old)


def test_a_listing_tells_kind_key_size_and_times(bench: Bench, store: Store) -> None:
    assert store.entries() == []
    before = time.time()
    store.obtain("thing", KEY, fill)
    store.obtain("another", KEY, lambda draft: draft.write_json("a.json", 1))
    another, thing = store.entries()
    assert (another.kind, thing.kind, thing.key) == ("another", "thing", KEY)
    assert thing.bytes == sum(len(bench.get("thing", KEY, name)) for name in FILES)
    assert before - 1 <= thing.made <= time.time() + 1
    assert before - 1 <= thing.used <= time.time() + 1


def test_verify_names_what_is_damaged_and_only_that(bench: Bench, store: Store) -> None:
    store.obtain("thing", KEY, fill)
    store.obtain("another", KEY, fill)
    assert store.verify() == []
    content = bench.get("another", KEY, "value.json")
    bench.put("another", KEY, "value.json", content.replace(b"1", b"7"))
    ((entry, reason),) = store.verify()
    assert entry.kind == "another"
    assert "value.json" in reason


def test_an_artefact_that_is_removed_leaves_the_others(bench: Bench, store: Store) -> None:
    store.obtain("thing", KEY, fill)
    kept, _ = store.obtain("another", KEY, fill)
    assert store.discard("thing", KEY) is True
    assert [entry.kind for entry in store.entries()] == ["another"]
    assert store.find("thing", KEY) is None
    assert store.discard("thing", KEY) is False
    assert bench.open().find("another", KEY) == kept


def test_opening_looks_at_the_argument_then_the_environment_then_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert Store.open().root == default_location() == tmp_path / "cache" / "bmm" / "store"
    monkeypatch.setenv("BMM_STORE", str(tmp_path / "named"))
    assert Store.open().root == tmp_path / "named"
    assert Store.open(tmp_path / "given").root == tmp_path / "given"
    assert not list(tmp_path.iterdir())
