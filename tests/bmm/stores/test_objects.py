"""What only a store in a bucket does: copies, uploads that are killed, several machines."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from object_server import KEY_ID, SECRET, FaultyProxy
from store_benches import FILES, KEY, ObjectBench, answer, child, drafts, fill, refuse, until

from bmm.digest import digest_json
from bmm.errors import ArtefactDamagedError, OutputError
from bmm.store import Draft, Reference, Store
from bmm.stores import objects as module
from bmm.stores.address import Address
from bmm.stores.manifest import MANIFEST, manifest_text
from bmm.stores.objects import ObjectStore

FOLDER = f"artefacts/thing/{KEY}"


@pytest.fixture
def store(objects: ObjectBench) -> Store:
    return objects.open()


def elsewhere(objects: ObjectBench, folder: Path) -> ObjectStore:
    """The same store, opened on another machine."""
    return ObjectStore(Address.parse(objects.location), folder / "another-machine")


# -- copies --------------------------------------------------------------------------------------------------


def test_files_are_fetched_once_and_again_only_if_damaged(
    objects: ObjectBench, store: Store, proxy: FaultyProxy, tmp_path: Path
) -> None:
    reference, _ = store.obtain("thing", KEY, fill)
    other = elsewhere(objects, tmp_path)
    assert proxy.asked("GET", f"{FOLDER}/") - proxy.asked("GET", MANIFEST) == 0
    artefact = other.read(reference)
    for name in FILES[1:]:
        assert artefact.file(name).read_bytes() == objects.get("thing", KEY, name)

    def fetched() -> int:
        return proxy.asked("GET", f"{FOLDER}/") - proxy.asked("GET", MANIFEST)

    assert fetched() == 2
    assert other.read(reference) == artefact
    assert fetched() == 2
    artefact.file("value.json").write_text("damaged")
    assert other.read(reference).read_json("value.json")["b"] == 1
    assert fetched() == 3
    shutil.rmtree(artefact.path)
    assert other.find("thing", KEY) == reference
    assert fetched() == 5
    assert drafts(other) == []


def test_nothing_is_fetched_to_know_that_it_is_there(objects: ObjectBench, store: Store, proxy: FaultyProxy) -> None:
    reference, _ = store.obtain("thing", KEY, fill)
    objects.forget_copies()
    assert objects.open().holds(reference)
    assert not (store.root / "artefacts").exists()
    missing = objects.path("thing", KEY, "value.json").rpartition("/")[2]
    objects.drop("thing", KEY, "value.json")
    assert missing not in " ".join(objects.listed())
    assert not objects.open().holds(reference)


def test_damage_found_on_reading_ends_the_belief_that_it_is_there(objects: ObjectBench, store: Store) -> None:
    reference, _ = store.obtain("thing", KEY, fill)
    objects.put("thing", KEY, "deep/er/bytes.bin", bytes(200))
    assert store.holds(reference)
    with pytest.raises(ArtefactDamagedError, match=r"has a damaged file, deep/er/bytes\.bin"):
        store.read(reference)
    assert not store.holds(reference)
    assert store.obtain("thing", KEY, fill) == (reference, False)
    assert objects.open().read(reference).read_json("value.json")["b"] == 1


@pytest.mark.parametrize("name", ["../../../../escaped", "/escaped", "a/../../b"])
def test_a_manifest_cannot_write_outside_the_copies(objects: ObjectBench, store: Store, name: str) -> None:
    store.obtain("thing", KEY, fill)
    manifest = json.loads(objects.get("thing", KEY, MANIFEST))
    manifest["files"] = {name: manifest["files"]["value.json"]}
    del manifest["seal"]
    manifest["seal"] = digest_json(manifest)
    objects.put("thing", KEY, MANIFEST, manifest_text(manifest).encode())
    with pytest.raises(ArtefactDamagedError, match="names a file outside its folder"):
        store.read(Reference("thing", KEY, manifest["digest"]))


def test_copies_are_removed_when_they_are_old_and_the_bucket_keeps_its_own(objects: ObjectBench, store: Store) -> None:
    reference, _ = store.obtain("thing", KEY, fill)
    newer, _ = store.obtain("another", KEY, fill)
    os.utime(store.read(reference).file(MANIFEST), (1000, 1000))
    number, size = store.remove_copies(2000, dry_run=True)
    assert (number, size) == (1, sum(len(objects.get("thing", KEY, name)) for name in FILES))
    assert store.remove_copies(2000) == (number, size)
    assert store.remove_copies(2000) == (0, 0)
    assert not (store.root / FOLDER).exists()
    assert store.read(newer).path.exists()
    assert store.find("thing", KEY) == reference


def test_the_last_use_is_noted_in_the_bucket_to_the_day(
    objects: ObjectBench, store: Store, monkeypatch: pytest.MonkeyPatch, proxy: FaultyProxy
) -> None:
    reference, _ = store.obtain("thing", KEY, fill)
    (before,) = store.entries()
    puts = proxy.asked("PUT", MANIFEST)
    assert store.find("thing", KEY) == reference
    assert proxy.asked("PUT", MANIFEST) == puts
    monkeypatch.setattr(module, "NOTED_SECONDS", -10.0)
    time.sleep(1.1)
    assert store.find("thing", KEY) == reference
    assert proxy.asked("PUT", MANIFEST) == puts + 1
    (after,) = store.entries()
    assert after.used > before.used
    assert after.made == before.made
    assert store.holds(reference)


def test_a_read_only_secret_reads_and_leaves_no_note(
    store: Store, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, _ = store.obtain("thing", KEY, fill)
    monkeypatch.setattr(module, "NOTED_SECONDS", -10.0)
    proxy.choose = lambda method, _: None if method == "GET" else "403"
    assert store.find("thing", KEY) == reference
    with pytest.raises(OutputError, match="refuses these credentials"):
        store.obtain("thing", "0" * 64, fill)


# -- uploads that are killed ---------------------------------------------------------------------------------

MAKE = """
    def make(draft):
        draft.write_json("value.json", {"b": 1, "a": [1.5, None, "é"]})
        (draft.path / "deep" / "er").mkdir(parents=True)
        (draft.path / "deep" / "er" / "bytes.bin").write_bytes(bytes(range(200)))
        draft.provenance["note"] = "made in a test"
    print(Store.open(sys.argv[1]).obtain("thing", sys.argv[2], make)[1])
"""


@pytest.mark.parametrize("where", ["a file", "the manifest"])
def test_a_writer_killed_in_the_middle_of_an_upload_leaves_nothing_that_looks_whole(
    objects: ObjectBench, proxy: FaultyProxy, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = {"a file": 1, "the manifest": 2}[where]
    proxy.choose = lambda method, path: (
        "hold" if method == "PUT" and "artefacts/" in path and proxy.asked("PUT", "artefacts/") >= second else None
    )
    writer = child(MAKE, objects.location, KEY)
    until(lambda: "hold" in proxy.faults)
    writer.kill()
    writer.communicate(timeout=60)
    proxy.choose = lambda *_: None
    assert len([key for key in objects.listed() if key.startswith(FOLDER)]) == second
    store = objects.open()
    assert store.find("thing", KEY) is None
    assert store.entries() == []
    assert store.verify() == []
    # What it has sent goes when it is old; by then nobody is still sending.
    assert store.remove_uploads() == 0
    monkeypatch.setattr(module, "LEFTOVER_SECONDS", -10.0)
    assert store.remove_uploads() == second
    assert store.remove_uploads() == 0
    reference, cached = store.obtain("thing", KEY, fill)
    assert not cached
    assert objects.open().read(reference).read_json("value.json")["b"] == 1
    assert store.remove_uploads() == 0
    assert drafts(store) == []


# -- several machines ----------------------------------------------------------------------------------------


def test_two_machines_make_an_artefact_once(objects: ObjectBench, tmp_path: Path) -> None:
    code = """
        location, key, tries = sys.argv[1:]
        def make(draft):
            Path(tries, str(os.getpid())).write_text("")
            time.sleep(0.5)
            draft.write_json("value.json", 1)
        while not Path(tries, "go").exists():
            time.sleep(0.005)
        reference, cached = Store.open(location).obtain("thing", key, make)
        print(reference.digest, cached)
    """
    tries = tmp_path / "tries"
    tries.mkdir()
    machines = [
        child(code, objects.location, KEY, str(tries), env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / name)})
        for name in ("one", "two")
    ]
    (tries / "go").write_text("")
    answers = [answer(machine).split() for machine in machines]
    assert len(list(tries.iterdir())) == 2
    assert len({digest for digest, _ in answers}) == 1
    assert sorted(cached for _, cached in answers) == ["False", "True"]
    assert not [key for key in objects.listed() if key.startswith("leases/")]


def test_who_comes_second_takes_the_firsts(objects: ObjectBench, store: Store, tmp_path: Path) -> None:
    """Leases save work; with one lost, two machines make the same at once."""
    other = elsewhere(objects, tmp_path)

    def make_after_another(draft: Draft) -> None:
        other._make("thing", KEY, lambda theirs: (fill(theirs), theirs.provenance.update(note="first"))[0], {})  # type: ignore[func-returns-value]
        fill(draft)

    reference, cached = store.obtain("thing", KEY, make_after_another)
    assert not cached
    assert store.read(reference).provenance["note"] == "first"
    assert other.read(reference).provenance["note"] == "first"
    assert drafts(store) == []


def test_a_holder_on_another_machine_keeps_an_artefact_from_being_removed(
    objects: ObjectBench, store: Store, tmp_path: Path
) -> None:
    store.obtain("thing", KEY, fill)
    wait = """
        def make(draft):
            print("making", flush=True)
            sys.stdin.read()
            draft.write_json("value.json", 1)
        Store.open(sys.argv[1]).obtain("thing", sys.argv[2], make, replace=True)
    """
    there = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "there")}
    living = child(wait, objects.location, KEY, stdin=subprocess.PIPE, env=there)
    assert living.stdout is not None
    assert living.stdout.readline() == "making\n"
    assert store.discard("thing", KEY) is False
    answer(living)
    assert store.discard("thing", KEY) is True


# -- secrets and questions -----------------------------------------------------------------------------------


def test_no_secret_is_written_anywhere(objects: ObjectBench, store: Store, proxy: FaultyProxy) -> None:
    store.obtain("thing", KEY, fill)
    objects.open(fresh=True).obtain("thing", KEY, fill)
    stored = [objects._server.ask("GET", f"{objects.bucket}/some/where/{key}") for key in objects.listed()]
    kept = [path.read_bytes() for path in store.root.rglob("*") if path.is_file()]
    assert len(stored) == 3
    for content in [*stored, *kept]:
        assert SECRET.encode() not in content
        assert KEY_ID.encode() not in content


def test_a_store_is_asked_before_work_begins(
    objects: ObjectBench, store: Store, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.check()
    monkeypatch.setattr(module, "HASTE_SECONDS", 0.2)
    proxy.choose = lambda *_: "503"
    with pytest.raises(OutputError, match="has not answered"):
        objects.open().check()
    proxy.choose = lambda *_: None
    with pytest.raises(OutputError, match="there is no bucket"):
        Store.open("s3://no-such-bucket/x").check()
    assert store.free_bytes() is None


def test_a_damaged_manifest_is_replaced_and_its_files_with_it(objects: ObjectBench, store: Store) -> None:
    store.obtain("thing", KEY, fill)
    text = objects.get("thing", KEY, MANIFEST)
    stranger = json.dumps({**json.loads(text), "kind": "other"}, indent=1, sort_keys=True).encode()
    objects.put("thing", KEY, MANIFEST, stranger)
    assert store.find("thing", KEY) is None
    new, _ = store.obtain("thing", KEY, lambda draft: draft.write_json("value.json", 0))
    assert store.read(new).read_json("value.json") == 0
    # The manifest and one file: what only the old one named is gone.
    assert len([key for key in objects.listed() if key.startswith(FOLDER)]) == 2
    assert store.obtain("thing", KEY, refuse) == (new, True)
