"""What only a store in a folder does."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from store_benches import KEY, answer, child, drafts, fill, refuse

from bmm.errors import ArtefactDamagedError, OutputError
from bmm.store import Store
from bmm.stores.manifest import MANIFEST


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store")


@pytest.mark.parametrize(
    "harm",
    [
        lambda folder: shutil.rmtree(folder / "deep"),
        lambda folder: shutil.rmtree(folder),
        lambda folder: (folder / "extra.txt").write_text(""),
        lambda folder: (folder / "deep" / "extra.txt").write_text("x"),
    ],
)
def test_a_missing_folder_or_a_file_too_much_is_noticed_and_mended(store: Store, harm: Any) -> None:
    reference, _ = store.obtain("thing", KEY, fill)
    harm(store.read(reference).path)
    assert store.find("thing", KEY) is None
    with pytest.raises(ArtefactDamagedError):
        store.read(reference)
    assert store.obtain("thing", KEY, fill) == (reference, False)
    assert store.obtain("thing", KEY, refuse) == (reference, True)
    assert drafts(store) == []


def test_a_file_of_equal_size_and_time_is_read_again_by_the_next_process(store: Store) -> None:
    reference, _ = store.obtain("thing", KEY, fill)
    file = store.read(reference).file("deep/er/bytes.bin")
    state = file.stat()
    file.write_bytes(bytes(200))
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert Store.open(store.root).find("thing", KEY) is None


def test_being_found_counts_as_being_used(store: Store) -> None:
    store.obtain("thing", KEY, fill)
    os.utime(store.root / "artefacts" / "thing" / KEY / MANIFEST, (1000, 1000))
    (entry,) = store.entries()
    assert entry.used == 1000
    assert entry.made > 1000
    assert store.find("thing", KEY) is not None
    assert store.entries()[0].used > time.time() - 60


def test_a_lost_manifest_is_listed_and_named(store: Store) -> None:
    reference, _ = store.obtain("thing", KEY, fill)
    store.read(reference).file(MANIFEST).unlink()
    (entry,) = store.entries()
    assert (entry.kind, entry.key) == ("thing", KEY)
    ((_, reason),) = store.verify()
    assert "lost its manifest" in reason


def test_what_is_removed_meanwhile_is_neither_listed_nor_damaged(store: Store) -> None:
    stop, made = threading.Event(), 0

    def churn() -> None:
        nonlocal made
        # A run's shards come and go.
        while not stop.is_set():
            store.obtain("gram-shard", f"{made % 8:064x}", fill)
            made += 1
            store.discard("gram-shard", f"{(made + 4) % 8:064x}")

    thread = threading.Thread(target=churn)
    thread.start()
    looking = Store.open(store.location)
    try:
        end = time.monotonic() + 2
        while time.monotonic() < end or made < 50:
            assert looking.verify() == []
    finally:
        stop.set()
        thread.join()


def test_a_read_only_store_is_read_and_refuses_to_be_written(store: Store) -> None:
    reference, _ = store.obtain("thing", KEY, fill)
    # Even root must ask for permission once its capabilities are gone.
    code = """
        import ctypes
        from bmm.errors import OutputError
        libc = ctypes.CDLL(None, use_errno=True)
        header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert libc.capset(header, data) == 0
        store = Store.open(sys.argv[1])
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


def test_a_store_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        Store.open(tmp_path / "file")
    with pytest.raises(OutputError, match="which is a file"):
        Store.open(tmp_path / "file" / "store")
