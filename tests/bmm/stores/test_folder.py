"""A store that was there and is away now is not made anew, whatever is asked of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from bmm.stores.folder import Folder
from bmm.stores.manifest import manifest_of

KEY = "0" * 64


@pytest.fixture
def seen(tmp_path: Path) -> Folder:
    """A folder that has an artefact, and has been read from."""
    folder = Folder(tmp_path / "store")
    write(folder)
    folder.load("thing", KEY)
    return folder


def write(folder: Folder) -> None:
    with folder.locked("thing", KEY), folder.drafted("thing", KEY) as draft:
        draft.write_json("value.json", 1)
        folder.settle(draft.path, manifest_of(draft.path, "thing", KEY, {}, {}, 0.0))


def lock(folder: Folder) -> None:
    with folder.locked("thing", KEY):
        pytest.fail("a lock was held in a store that is away")


def lock_if_free(folder: Folder) -> None:
    with folder.locked_if_free("thing", KEY):
        pytest.fail("a lock was held in a store that is away")


@pytest.mark.parametrize("ask", [lock, lock_if_free, write])
def test_nothing_makes_it_anew(seen: Folder, ask: Callable[[Folder], None]) -> None:
    elsewhere = seen.root.rename(seen.root.with_name("elsewhere"))
    with pytest.raises(FileNotFoundError):
        ask(seen)
    assert not seen.root.exists()
    elsewhere.rename(seen.root)
    assert seen.load("thing", KEY).read_json("value.json") == 1


def test_a_draft_that_outlives_it_is_not_put_into_another(seen: Folder) -> None:
    with seen.locked("thing", KEY), seen.drafted("thing", KEY) as draft:
        seen.root.rename(seen.root.with_name("elsewhere"))
        # Some libraries make the folders of a file that they write.
        draft.path.mkdir(parents=True)
        draft.write_json("value.json", 2)
        manifest = manifest_of(draft.path, "thing", KEY, {}, {}, 0.0)
        with pytest.raises(FileNotFoundError):
            seen.settle(draft.path, manifest)
    assert not (seen.root / "artefacts").exists()


def test_a_copy_of_what_lies_elsewhere_is_made_anew(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "copies", cache=True)
    with folder.locked_if_free("thing", KEY) as free:
        assert free
