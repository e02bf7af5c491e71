from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bmm.errors import ArtefactDamagedError, DataError, OutputError, UserError
from bmm.store import MANIFEST, Draft, Reference, Store, artefact_key, default_location

KEY = artefact_key("thing", 1, {"from": "here"}, {"how": 3})


def fill(draft: Draft) -> None:
    draft.write_json("value.json", {"b": 1, "a": [1.5, None, "é"]})
    (draft.path / "deep" / "er").mkdir(parents=True)
    (draft.path / "deep" / "er" / "bytes.bin").write_bytes(bytes(range(200)))
    draft.provenance["note"] = "made in a test"


def refuse(draft: Draft) -> None:
    raise AssertionError("made again")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def child(code: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    """Start Python on `code`, with the store's names at hand."""
    opening = "import os, sys, time, signal\nfrom pathlib import Path\nfrom bmm.store import Store\n"
    return subprocess.Popen(
        [sys.executable, "-c", opening + textwrap.dedent(code), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def answer(process: subprocess.Popen[str]) -> str:
    out, problems = process.communicate(timeout=60)
    assert process.returncode == 0, problems
    return out.strip()


def until(condition: Any) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_an_artefact_is_made_once_and_read_back(store: Store) -> None:
    assert store.find("thing", KEY) is None
    reference, cached = store.obtain("thing", KEY, fill, describe={"inputs": ["x"]})
    assert not cached
    assert store.obtain("thing", KEY, refuse) == (reference, True)
    assert store.find("thing", KEY) == reference
    artefact = Store(store.root).read(reference)
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


def test_equal_content_has_an_equal_digest_whenever_and_under_whatever_key_it_is_made(tmp_path: Path) -> None:
    references = []
    for place, key in (("one", KEY), ("two", "0" * 64)):
        store = Store(tmp_path / place)
        references.append(store.obtain("thing", key, fill)[0])
        for path in (store.root / "artefacts").rglob("*"):
            os.utime(path, (1, 1))
        assert Store(store.root).find("thing", key) == references[-1]
    assert references[0].digest == references[1].digest

    def other(draft: Draft) -> None:
        fill(draft)
        draft.write_json("value.json", {"b": 2})

    assert Store(tmp_path / "three").obtain("thing", KEY, other)[0].digest != references[0].digest


def test_a_file_under_another_name_is_another_content(tmp_path: Path) -> None:
    digests = {
        Store(tmp_path / name).obtain("thing", KEY, lambda draft, name=name: draft.write_json(name, 1))[0].digest
        for name in ("a.json", "b.json")
    }
    assert len(digests) == 2


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from([MANIFEST, "value.json", "deep/er/bytes.bin"]),
    where=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 7),
)
def test_any_flipped_bit_is_noticed_and_mended(store: Store, name: str, where: float, bit: int) -> None:
    reference, _ = store.obtain("thing", KEY, fill)
    file = store.read(reference).file(name)
    content = bytearray(file.read_bytes())
    content[int(where * len(content))] ^= 1 << bit
    file.write_bytes(content)
    for reader in (store, Store(store.root)):
        assert reader.find("thing", KEY) is None
        with pytest.raises(ArtefactDamagedError, match=KEY[:12]):
            reader.read(reference)
    made: list[Draft] = []
    again, cached = store.obtain("thing", KEY, lambda draft: (made.append(draft), fill(draft))[1])  # type: ignore[func-returns-value]
    assert (again, cached, len(made)) == (reference, False, 1)
    assert Store(store.root).find("thing", KEY) == reference


def test_a_number_beyond_its_precision_is_noticed_in_the_manifest(store: Store) -> None:
    reference, _ = store.obtain("thing", KEY, lambda draft: draft.provenance.update(share=0.1))
    manifest = store.read(reference).path / MANIFEST
    text = manifest.read_text()
    assert '"share": 0.1' in text
    manifest.write_text(text.replace('"share": 0.1', '"share": 0.10'))
    assert store.find("thing", KEY) is None


@pytest.mark.parametrize(
    "harm",
    [
        lambda folder: (folder / "value.json").unlink(),
        lambda folder: (folder / MANIFEST).unlink(),
        lambda folder: shutil.rmtree(folder / "deep"),
        lambda folder: shutil.rmtree(folder),
        lambda folder: os.truncate(folder / "deep" / "er" / "bytes.bin", 100),
        lambda folder: os.truncate(folder / "value.json", 0),
        lambda folder: os.truncate(folder / MANIFEST, 40),
        lambda folder: (folder / MANIFEST).write_text("[]"),
        lambda folder: (folder / MANIFEST).write_text("{}"),
        lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe"),
        lambda folder: (folder / MANIFEST).write_text("[" * 100_000),
        lambda folder: (folder / "extra.txt").write_text(""),
        lambda folder: (folder / "deep" / "extra.txt").write_text("x"),
        lambda folder: (folder / "value.json").write_text("{}"),
    ],
)
def test_a_missing_cut_or_superfluous_file_is_noticed_and_mended(store: Store, harm: Any) -> None:
    reference, _ = store.obtain("thing", KEY, fill)
    harm(store.read(reference).path)
    assert store.find("thing", KEY) is None
    with pytest.raises(ArtefactDamagedError):
        store.read(reference)
    assert store.obtain("thing", KEY, fill) == (reference, False)
    assert store.obtain("thing", KEY, refuse) == (reference, True)
    assert not list((store.root / "drafts").iterdir())


def test_a_file_of_equal_size_and_time_is_read_again_by_the_next_process(store: Store) -> None:
    reference, _ = store.obtain("thing", KEY, fill)
    file = store.read(reference).file("deep/er/bytes.bin")
    state = file.stat()
    file.write_bytes(bytes(200))
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert Store(store.root).find("thing", KEY) is None


def test_a_manifest_of_another_artefact_does_not_pass(store: Store) -> None:
    store.obtain("thing", KEY, fill)
    other = artefact_key("thing", 1, {}, {})
    mine, _ = store.obtain("thing", other, lambda draft: draft.write_json("value.json", 0))
    shutil.copy(store.root / "artefacts" / "thing" / KEY / MANIFEST, store.read(mine).path / MANIFEST)
    assert store.find("thing", other) is None


def test_a_reference_to_what_has_been_replaced_is_refused(store: Store) -> None:
    old, _ = store.obtain("thing", KEY, fill)
    new, cached = store.obtain("thing", KEY, lambda draft: draft.write_json("value.json", 0), replace=True)
    assert not cached
    assert store.read(new).read_json("value.json") == 0
    with pytest.raises(ArtefactDamagedError, match="has been replaced"):
        store.read(old)


def test_fresh_makes_everything_anew_but_once(store: Store) -> None:
    store.obtain("thing", KEY, fill)
    (store.root / "progress" / f"thing-{KEY}").mkdir(parents=True)
    (store.root / "progress" / f"thing-{KEY}" / "log").write_text("of an earlier run")
    fresh = Store(store.root, fresh=True)
    seen: list[bool] = []

    def make(draft: Draft) -> None:
        seen.append(draft.progress.exists())
        fill(draft)

    assert fresh.obtain("thing", KEY, make)[1] is False
    assert fresh.obtain("thing", KEY, refuse)[1] is True
    assert seen == [False]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(3)])
def test_a_make_that_fails_leaves_nothing(store: Store, error: BaseException) -> None:
    def make(draft: Draft) -> None:
        fill(draft)
        raise error

    with pytest.raises(type(error)):
        store.obtain("thing", KEY, make)
    assert store.find("thing", KEY) is None
    assert not list((store.root / "drafts").iterdir())
    assert not (store.root / "artefacts").exists()
    assert store.obtain("thing", KEY, fill)[1] is False


def test_a_failed_replacement_leaves_the_old_artefact(store: Store) -> None:
    reference, _ = store.obtain("thing", KEY, fill)
    with pytest.raises(AssertionError):
        store.obtain("thing", KEY, refuse, replace=True)
    assert Store(store.root).find("thing", KEY) == reference


def test_progress_survives_a_failure_and_ends_with_the_artefact(store: Store) -> None:
    def first(draft: Draft) -> None:
        draft.progress.mkdir(parents=True)
        (draft.progress / "log").write_text("halfway")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        store.obtain("thing", KEY, first)
    seen: list[str] = []
    store.obtain("thing", KEY, lambda draft: seen.append((draft.progress / "log").read_text()))
    assert seen == ["halfway"]
    assert not list((store.root / "progress").iterdir())


def test_two_processes_that_want_the_same_artefact_make_it_once(store: Store, tmp_path: Path) -> None:
    code = """
        root, key, tries = sys.argv[1:]
        def make(draft):
            Path(tries, str(os.getpid())).write_text("")
            time.sleep(0.5)
            draft.write_json("value.json", 1)
        while not Path(tries, "go").exists():
            time.sleep(0.005)
        reference, cached = Store(Path(root)).obtain("thing", key, make)
        print(reference.digest, cached)
    """
    tries = tmp_path / "tries"
    tries.mkdir()
    racers = [child(code, str(store.root), KEY, str(tries)) for _ in range(3)]
    (tries / "go").write_text("")
    answers = [answer(racer).split() for racer in racers]
    assert len(list(tries.iterdir())) == 2
    assert len({digest for digest, _ in answers}) == 1
    assert sorted(cached for _, cached in answers) == ["False", "True", "True"]


def test_a_killed_process_leaves_no_artefact_and_its_progress_only(store: Store) -> None:
    code = """
        def make(draft):
            draft.write_json("value.json", 1)
            draft.progress.mkdir(parents=True)
            (draft.progress / "log").write_text("halfway")
            os.kill(os.getpid(), signal.SIGKILL)
        Store(Path(sys.argv[1])).obtain("thing", sys.argv[2], make)
    """
    process = child(code, str(store.root), KEY)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert store.find("thing", KEY) is None
    assert store.entries() == []
    left = list((store.root / "drafts").iterdir())
    assert len(left) == 1
    seen: list[str] = []

    def make(draft: Draft) -> None:
        assert not left[0].exists()
        seen.append((draft.progress / "log").read_text())
        fill(draft)

    assert store.obtain("thing", KEY, make)[1] is False
    assert seen == ["halfway"]
    assert not list((store.root / "drafts").iterdir())


def test_leftovers_of_the_dead_are_removed_and_drafts_of_the_living_kept(store: Store) -> None:
    other = artefact_key("other-kind", 1, {}, {})
    die = """
        def make(draft):
            os.kill(os.getpid(), signal.SIGKILL)
        Store(Path(sys.argv[1])).obtain("thing", sys.argv[2], make)
    """
    wait = """
        def make(draft):
            draft.write_json("value.json", 1)
            sys.stdin.read()
        print(Store(Path(sys.argv[1])).obtain("other-kind", sys.argv[2], make)[0].key)
    """
    child(die, str(store.root), KEY).communicate(timeout=60)
    living = child(wait, str(store.root), other, stdin=subprocess.PIPE)
    drafts = store.root / "drafts"
    until(lambda: list(drafts.glob("other-kind-*/value.json")))
    assert store.remove_leftovers() == 1
    assert [path.name.rsplit("-", 1)[0] for path in drafts.iterdir()] == [f"other-kind-{other}"]
    assert store.remove_leftovers() == 0
    assert answer(living) == other
    assert store.find("other-kind", other) is not None


def test_an_artefact_at_work_on_is_not_removed(store: Store) -> None:
    reference, _ = store.obtain("thing", KEY, fill)
    wait = """
        def make(draft):
            draft.write_json("value.json", 1)
            sys.stdin.read()
        Store(Path(sys.argv[1])).obtain("thing", sys.argv[2], make, replace=True)
    """
    living = child(wait, str(store.root), KEY, stdin=subprocess.PIPE)
    until(lambda: list((store.root / "drafts").glob("*/value.json")))
    assert store.discard("thing", KEY) is False
    # The old one is whole until the new one takes its place.
    assert Store(store.root).read(reference).read_json("value.json")["b"] == 1
    answer(living)
    found = store.find("thing", KEY)
    assert found is not None
    assert store.read(found).read_json("value.json") == 1
    assert store.discard("thing", KEY) is True
    assert store.find("thing", KEY) is None
    assert store.discard("thing", KEY) is False


def test_a_reader_during_replacements_sees_a_whole_artefact_or_none(store: Store) -> None:
    code = """
        store, key = Store(Path(sys.argv[1])), sys.argv[2]
        print("started", flush=True)
        for number in range(40):
            def make(draft):
                for part in "abc":
                    draft.write_json(part + ".json", [number] * 100)
            store.obtain("thing", key, make, replace=True)
    """
    writer = child(code, str(store.root), KEY)
    reader = Store(store.root)
    whole = 0
    while writer.poll() is None:
        found = reader.find("thing", KEY)
        if found is None:
            continue
        try:
            artefact = reader.read(found)
            texts = {artefact.file(f"{part}.json").read_text() for part in "abc"}
        except (ArtefactDamagedError, FileNotFoundError):
            continue
        # Files read one by one may straddle a replacement; each on its own is never half-written.
        assert all(len(set(json.loads(text))) == 1 for text in texts)
        whole += 1
    answer(writer)
    assert whole > 0
    assert reader.find("thing", KEY) is not None
    assert not list((store.root / "drafts").iterdir())


def test_a_listing_tells_kind_key_size_and_times(store: Store) -> None:
    assert store.entries() == []
    before = time.time()
    store.obtain("thing", KEY, fill)
    store.obtain("another", KEY, lambda draft: draft.write_json("a.json", 1))
    another, thing = store.entries()
    assert (another.kind, thing.kind, thing.key) == ("another", "thing", KEY)
    assert thing.bytes == sum(path.stat().st_size for path in thing.path.rglob("*") if path.is_file())
    assert before - 1 <= thing.made <= time.time() + 1


def test_being_found_counts_as_being_used(store: Store) -> None:
    store.obtain("thing", KEY, fill)
    os.utime(store.root / "artefacts" / "thing" / KEY / MANIFEST, (1000, 1000))
    (entry,) = store.entries()
    assert entry.used == 1000
    assert entry.made > 1000
    assert store.find("thing", KEY) is not None
    assert store.entries()[0].used > time.time() - 60


def test_verify_names_what_is_damaged_and_only_that(store: Store) -> None:
    store.obtain("thing", KEY, fill)
    store.obtain("another", KEY, fill)
    assert store.verify() == []
    file = store.root / "artefacts" / "another" / KEY / "value.json"
    state = file.stat()
    file.write_text(file.read_text().replace("1", "7"))
    # Same size, same time: only the bytes tell.
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    ((entry, reason),) = store.verify()
    assert entry.kind == "another"
    assert "value.json" in reason


def test_an_artefact_that_is_removed_leaves_the_others(store: Store) -> None:
    store.obtain("thing", KEY, fill)
    kept, _ = store.obtain("another", KEY, fill)
    (gone,) = [entry for entry in store.entries() if entry.kind == "thing"]
    assert store.remove(gone) is True
    assert not gone.path.exists()
    assert [entry.kind for entry in store.entries()] == ["another"]
    assert Store(store.root).find("another", KEY) == kept


def test_a_full_disk_is_one_sentence_and_nothing_half_written(store: Store) -> None:
    code = """
        import resource
        from bmm.errors import OutputError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        def make(draft):
            draft.write_json("small.json", 1)
            (draft.path / "large.bin").write_bytes(bytes(100_000))
        try:
            Store(Path(sys.argv[1])).obtain("thing", sys.argv[2], make)
        except OutputError as error:
            print(error)
    """
    said = answer(child(code, str(store.root), KEY))
    assert said.startswith(f"{store.root} cannot be written: the disk is full")
    assert not list((store.root / "drafts").iterdir())
    assert store.entries() == []
    assert store.obtain("thing", KEY, fill)[1] is False


def test_a_full_disk_that_safetensors_meets_is_the_same_sentence(store: Store) -> None:
    code = """
        import resource, numpy
        from safetensors.numpy import save_file
        from bmm.errors import OutputError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        def make(draft):
            save_file({"a": numpy.zeros(100_000)}, draft.path / "a.safetensors")
        try:
            Store(Path(sys.argv[1])).obtain("thing", sys.argv[2], make)
        except OutputError as error:
            print(error)
    """
    assert "the disk is full" in answer(child(code, str(store.root), KEY))
    assert store.entries() == []


def test_a_read_only_store_is_read_and_refuses_to_be_written(store: Store) -> None:
    reference, _ = store.obtain("thing", KEY, fill)
    # Even root must ask for permission once its capabilities are gone.
    code = """
        import ctypes
        from bmm.errors import OutputError
        libc = ctypes.CDLL(None, use_errno=True)
        header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert libc.capset(header, data) == 0
        store = Store(Path(sys.argv[1]))
        print(store.obtain("thing", sys.argv[2], None)[0].digest)
        try:
            store.obtain("thing", "0" * 64, lambda draft: draft.write_json("a.json", 1))
        except OutputError as error:
            print(error)
    """
    folders = [store.root, *(path for path in store.root.rglob("*"))]
    modes = {path: path.stat().st_mode for path in folders}
    for path in folders:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        digest, said = answer(child(code, str(store.root), KEY)).split("\n")
    finally:
        for path, mode in modes.items():
            path.chmod(mode)
    assert digest == reference.digest
    assert "permission denied" in said
    assert str(store.root) in said


def test_a_users_mistake_while_making_is_not_blamed_on_the_store(store: Store) -> None:
    def make(draft: Draft) -> None:
        try:
            raise PermissionError(13, "Permission denied", "rows.jsonl")
        except PermissionError:
            raise DataError("rows.jsonl cannot be read") from None

    with pytest.raises(DataError, match=r"rows\.jsonl cannot be read"):
        store.obtain("thing", KEY, make)


def test_opening_looks_at_the_argument_then_the_environment_then_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert Store.open().root == default_location() == tmp_path / "cache" / "bmm" / "store"
    monkeypatch.setenv("BMM_STORE", str(tmp_path / "named"))
    assert Store.open().root == tmp_path / "named"
    assert Store.open(tmp_path / "given").root == tmp_path / "given"
    assert not list(tmp_path.iterdir())


def test_a_store_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        Store.open(tmp_path / "file")
    with pytest.raises(UserError, match="local folders only"):
        Store.open("s3://bucket/store")
    with pytest.raises(OutputError, match="which is a file"):
        Store.open(tmp_path / "file" / "store")
