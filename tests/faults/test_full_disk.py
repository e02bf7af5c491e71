"""A disk that is really full: a small file system of the test's own where it may mount one, a limit on file sizes too.

The file system is filled to its last byte at the moment when a stage begins, so that the refusal strikes inside of it.
"""

from __future__ import annotations

import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bmm import pipeline
from bmm.pipeline import STAGES
from bmm.stages.request import Request, Result
from bmm.store import Store
from tests.faults.conftest import Answer, Bmm, assert_no_halves, change, model_files, records, tree

pytestmark = pytest.mark.slow

_BALLAST = "ballast"


@pytest.fixture
def little_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode != 0:
        pytest.skip(f"this user may not mount a file system: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(disk: Path) -> None:
    """Leave not one byte free."""
    with (disk / _BALLAST).open("wb", buffering=0) as ballast:
        for size in (1 << 16, 1):
            try:
                while True:
                    ballast.write(bytes(size))
            except OSError:
                continue


def free(disk: Path) -> None:
    """Give the space back."""
    (disk / _BALLAST).unlink()


@contextmanager
def full_from(stage: str, disk: Path) -> Iterator[None]:
    """Have a disk filled when a stage of a merge in this process begins."""
    perform = pipeline.perform_here

    def fill_and_perform(store: Store, request: Request) -> Result:
        if request.stage == stage:
            fill(disk)
        return perform(store, request)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "perform_here", fill_and_perform)
        yield


def eventually(condition: Callable[[], bool]) -> bool:
    """Say whether a condition comes to hold within a while."""
    end = time.monotonic() + 20.0
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def assert_refused(answer: Answer, place: Path) -> None:
    """Assert exit code 2 and one sentence that names the place and says what is wrong with it."""
    assert answer.code == 2, answer.out + answer.err
    assert len(answer.complaints) == 1, answer.err
    assert str(place) in answer.complaints[0]
    assert "disk is full" in answer.complaints[0]


@pytest.fixture
def warm(small: Path, scheduler: str) -> Path:
    """A small pico folder whose Grams are computed by workers that are there already."""
    change(small, lambda recipe: recipe.update(cluster={"scheduler": scheduler}))
    return small


@pytest.mark.parametrize("stage", ["experts", "grams", "anchor", "search", "evaluate", "publish"])
def test_a_full_store(
    stage: str,
    warm: Path,
    little_disk: Path,
    finished: tuple[Path, Path],
    bmm: Bmm,
    temporary: Path,
) -> None:
    store = little_disk / "store"
    before = tree(warm)
    with full_from(stage, little_disk):
        answer = bmm("merge", warm / "recipe.yaml", "--no-server", "--store", store)
    assert_refused(answer, store)
    assert tree(warm) == before
    assert list(temporary.iterdir()) == []
    assert not records(store, f"stage-{stage}")
    # A worker of somebody else's cluster finishes, and clears away, what it is at.
    assert eventually(lambda: not list((store / "drafts").glob("*")))
    assert Store.open(store).verify() == []
    free(little_disk)
    done = STAGES[: STAGES.index(stage)]
    states = bmm("merge", warm / "recipe.yaml", "--no-server", "--store", store, "--json").states()
    assert [name for name in STAGES if states[name] == "cached"] == list(done)
    assert model_files(warm / "merged") == model_files(finished[0] / "merged")
    assert_no_halves(store)


@pytest.mark.parametrize("earlier", [False, True], ids=["new output", "output that is there"])
def test_a_full_output(
    earlier: bool,
    warm: Path,
    little_disk: Path,
    finished: tuple[Path, Path],
    tmp_path: Path,
    bmm: Bmm,
) -> None:
    output, store = little_disk / "merged", tmp_path / "store"
    change(warm, lambda recipe: recipe.update(output=str(output)))
    words = ("merge", warm / "recipe.yaml", "--no-server", "--store", store)
    if earlier:
        change(warm, lambda recipe: recipe.update(dtype="bfloat16"))
        assert bmm(*words).code == 0
        change(warm, lambda recipe: recipe.pop("dtype"))
    before = tree(output)
    with full_from("publish", little_disk):
        answer = bmm(*words)
    assert_refused(answer, output)
    assert tree(output) == before
    assert {path.name for path in little_disk.iterdir()} == {_BALLAST} | ({"merged"} if earlier else set())
    assert_no_halves(store)
    free(little_disk)
    assert set(bmm(*words, "--json").states().values()) == {"cached"}
    assert model_files(output) == model_files(finished[0] / "merged")
    assert [path.name for path in little_disk.iterdir()] == ["merged"]


def limited(size: int) -> dict[str, Any]:
    """Return what keeps a command and its workers from writing a file larger than `size` bytes."""
    return {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))}


def test_files_too_large_for_the_store(
    small: Path, tmp_path: Path, finished: tuple[Path, Path], real_bmm: Bmm, bmm: Bmm, scheduler: str
) -> None:
    store = tmp_path / "store"
    layout = max(path.stat().st_size for path in (finished[1] / "artefacts" / "layout").rglob("*.json"))
    before = tree(small)
    words = ("merge", small / "recipe.yaml", "--no-server", "--store", store)
    # Enough for all that comes before the Gram matrices, too little for a worker's sums.
    answer = real_bmm(*words, **limited(layout + 1000))
    assert_refused(answer, store)
    assert tree(small) == before
    assert records(store, "stage-experts")
    assert not records(store, "grams")
    assert_no_halves(store)
    change(small, lambda recipe: recipe.update(cluster={"scheduler": scheduler}))
    states = bmm(*words, "--json").states()
    assert [name for name in STAGES if states[name] == "cached"] == ["experts", "task-vectors"]
    assert model_files(small / "merged") == model_files(finished[0] / "merged")


def test_files_too_large_for_the_output(
    warm: Path, tmp_path: Path, finished: tuple[Path, Path], real_bmm: Bmm, bmm: Bmm
) -> None:
    store = tmp_path / "store"
    report = (finished[0] / "merged" / "report.html").stat().st_size
    before = tree(warm)
    words = ("merge", warm / "recipe.yaml", "--no-server", "--store", store)
    # The report is the largest file of all, and the last to be written.
    answer = real_bmm(*words, **limited(report // 2))
    assert answer.code == 2, answer.out + answer.err
    assert len(answer.complaints) == 1, answer.err
    assert str(warm / "merged") in answer.complaints[0]
    assert tree(warm) == before
    assert_no_halves(store)
    assert set(bmm(*words, "--json").states().values()) == {"cached"}
    assert model_files(warm / "merged") == model_files(finished[0] / "merged")
