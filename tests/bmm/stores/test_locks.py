from __future__ import annotations

import threading
from pathlib import Path

import pytest

from bmm.stores.locks import locked_file


def test_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "one.lock"
    with locked_file(path) as held:
        assert held
        with locked_file(path, wait=False) as other:
            assert not other
    with locked_file(path, wait=False) as later:
        assert later


def test_no_folder_is_made_for_a_lock(tmp_path: Path) -> None:
    for wait in (True, False):
        with pytest.raises(FileNotFoundError), locked_file(tmp_path / "away" / "one.lock", wait=wait):
            pytest.fail("there is nothing to lock")
    assert list(tmp_path.iterdir()) == []


def test_who_waits_for_a_file_that_is_removed_holds_the_one_made_since(tmp_path: Path) -> None:
    path = tmp_path / "one.lock"
    waiting, over = threading.Event(), threading.Event()
    seen: list[bool] = []

    def wait() -> None:
        waiting.set()
        with locked_file(path) as held:
            seen.append(held)
            over.wait(30)

    thread = threading.Thread(target=wait)
    with locked_file(path):
        thread.start()
        waiting.wait(30)
        path.unlink()
    while not seen:
        thread.join(0.01)
    with locked_file(path, wait=False) as free:
        assert not free
    over.set()
    thread.join()
    assert seen == [True]
