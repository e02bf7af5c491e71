"""SIGKILL in every stage of a real command, then the same command again: nothing is lost, nothing is done twice.

A kill must strike inside the stage that it is meant for, however fast the machine. Where a stage leaves a trace while
it works, the test waits for that trace; elsewhere it holds the store's lock on an artefact, where the command then
waits for certain.
"""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from filelock import FileLock

from bmm.pipeline import STAGES
from bmm.store import Store
from tests.faults.conftest import Bmm, assert_no_halves, change, command, model_files, records, remove_artefacts

pytestmark = pytest.mark.slow

_PATIENCE = 90.0
_ORPHAN_SECONDS = 15.0
_IN_OPEN = 0x20  # from <sys/inotify.h>
_MADE_BY = {
    "experts": ("layout", "expert"),
    "task-vectors": ("task-vectors",),
    "grams": ("grams",),
    "anchor": ("anchor",),
    "search": ("search", "study", "predictions"),
    "evaluate": ("evaluation",),
    "publish": ("model",),
}
"""Kinds of artefact by the stage that makes them first."""


def kinds_from(stage: str, *, but: tuple[str, ...] = ()) -> list[str]:
    """Return what a stage and those after it make, their records included, without what the stages `but` make."""
    stages = [name for name in STAGES[STAGES.index(stage) :] if name not in but]
    return [kind for name in stages for kind in (f"stage-{name}", *_MADE_BY[name])]


def newest(store: Path, kind: str) -> str:
    """Return the key of the artefact of a kind that was made last."""
    return max((entry for entry in Store.open(store).entries() if entry.kind == kind), key=lambda entry: entry.made).key


@contextmanager
def held(store: Path, kind: str, key: str) -> Iterator[Callable[[], bool]]:
    """Hold the store's lock on an artefact; yields a function that says whether somebody has come to wait for it."""
    (store / "locks").mkdir(parents=True, exist_ok=True)
    path = store / "locks" / f"{kind}-{key}.lock"
    with FileLock(path):
        libc = ctypes.CDLL(None)
        watch = libc.inotify_init1(os.O_NONBLOCK)
        assert libc.inotify_add_watch(watch, os.fsencode(path), _IN_OPEN) >= 0
        try:
            yield lambda: bool(select.select([watch], [], [], 0)[0])
        finally:
            os.close(watch)


@contextmanager
def running(words: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command beside the test; whatever happens, it is gone at the end."""
    with log.open("wb") as sink, subprocess.Popen(words, env=environment, stdout=sink, stderr=sink) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[bytes], log: Path) -> None:
    """Return as soon as `condition` holds; fail if the command ends before."""
    end = time.monotonic() + _PATIENCE
    while not condition():
        assert process.poll() is None, f"the command ended too early: {log.read_text()}"
        assert time.monotonic() < end, f"nothing came of it in time: {log.read_text()}"
        time.sleep(0.002)


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the command, and it alone, and wait until all that it had started is gone."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    end = time.monotonic() + _ORPHAN_SECONDS
    while left := [child for child in children if alive(child)]:
        assert time.monotonic() < end, f"still there: {[child.cmdline() for child in left]}"
        time.sleep(0.05)


def alive(process: psutil.Process) -> bool:
    """Say whether a process still runs; one that waits to be collected does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Scene:
    """A merge that has got as far as the stages before some stage, by a store that held everything."""

    def __init__(self, finished: tuple[Path, Path], folder: Path, environment: dict[str, str]) -> None:
        self.reference, source = finished
        self.pico, self.store, self.log = folder / "pico", folder / "store", folder / "log"
        shutil.copytree(self.reference, self.pico, ignore=shutil.ignore_patterns("merged"))
        shutil.copytree(source, self.store)
        self.environment = environment

    def back_to(self, stage: str, *, but: tuple[str, ...] = ()) -> None:
        """Forget what a stage and those after it have made."""
        remove_artefacts(self.store, *kinds_from(stage, but=but))

    def made(self, kind: str) -> int:
        """Return the number of artefacts of a kind."""
        return len(records(self.store, kind))

    def words(self, *more: str) -> list[str]:
        """Return the command line of the merge."""
        return command("merge", self.pico / "recipe.yaml", "--store", self.store, "--json", *more)

    @contextmanager
    def started(self, *more: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run the merge as a process of its own, in this process's folder and without a server."""
        with running(self.words(*(more or ("--no-server",))), self.environment, self.log) as process:
            yield process

    def kill_when(self, condition: Callable[[], Any], *more: str) -> None:
        """Run the merge and kill it as soon as `condition` holds."""
        with self.started(*more) as process:
            wait_for(condition, process, self.log)
            kill(process)

    def everything(self) -> dict[str, dict[str, tuple[int, int]]]:
        """Return all artefacts that are there."""
        kinds = [path.name for path in (self.store / "artefacts").iterdir()]
        return {kind: records(self.store, kind) for kind in kinds}

    def assert_finishes(self, bmm: Bmm, ran: tuple[str, ...]) -> None:
        """Run the merge again: it makes nothing twice, says what ran, and ends at the bytes of the unbroken run."""
        before = self.everything()
        answer = bmm("merge", self.pico / "recipe.yaml", "--no-server", "--store", self.store, "--json")
        assert answer.states() == {stage: "ran" if stage in ran else "cached" for stage in STAGES}
        after = self.everything()
        for kind, artefacts in before.items():
            # A stage's record is written again with what the stage made; shards go when they are summed.
            if kind != "gram-shard" and not kind.startswith("stage-"):
                assert artefacts.items() <= after[kind].items(), f"{kind} was made twice"
        self.assert_same_model()

    def assert_same_model(self) -> None:
        """Assert that the output is that of the unbroken run, with no trace of the broken one."""
        assert model_files(self.pico / "merged") == model_files(self.reference / "merged")
        assert {path.name for path in self.pico.iterdir()} == {path.name for path in self.reference.iterdir()}
        assert_no_halves(self.store)


@pytest.fixture
def scene(finished: tuple[Path, Path], tmp_path: Path, environment: dict[str, str]) -> Scene:
    """A finished merge to go back from."""
    return Scene(finished, tmp_path, environment)


def test_in_experts(scene: Scene, bmm: Bmm) -> None:
    last = newest(scene.store, "expert")
    scene.back_to("experts", but=("grams",))
    with held(scene.store, "expert", last):
        scene.kill_when(lambda: scene.made("expert") == 2)
    assert not records(scene.store, "stage-experts")
    scene.assert_finishes(bmm, ("experts", "task-vectors", "anchor", "search", "evaluate", "publish"))


def test_in_task_vectors(scene: Scene, bmm: Bmm) -> None:
    last = newest(scene.store, "task-vectors")
    scene.back_to("task-vectors", but=("grams",))
    with held(scene.store, "task-vectors", last):
        scene.kill_when(lambda: scene.made("task-vectors") == 2)
    assert not records(scene.store, "stage-task-vectors")
    scene.assert_finishes(bmm, ("task-vectors", "anchor", "search", "evaluate", "publish"))


def test_in_grams(scene: Scene, bmm: Bmm, scheduler: str) -> None:
    shards = [path.stem.removeprefix("gram-shard-") for path in (scene.store / "locks").glob("gram-shard-*")]
    first_sum = min(
        (entry for entry in Store.open(scene.store).entries() if entry.kind == "grams"), key=lambda entry: entry.made
    ).key
    assert len(shards) == 6
    scene.back_to("grams")
    # Workers wait at one shard of the six, and do the others.
    with held(scene.store, "gram-shard", shards[0]):
        scene.kill_when(lambda: scene.made("gram-shard") >= 2)
    done = records(scene.store, "gram-shard")
    assert 2 <= len(done) < 6
    assert shards[0] not in done
    # The second run, on workers that are there already, may not sum before all shards have been looked at.
    change(scene.pico, lambda recipe: recipe.update(cluster={"scheduler": scheduler}))
    with scene.started() as process:
        with held(scene.store, "grams", first_sum):
            wait_for(lambda: scene.made("gram-shard") == 6, process, scene.log)
            all_six = records(scene.store, "gram-shard")
            assert done.items() <= all_six.items(), "a shard was computed twice"
        assert process.wait(timeout=_PATIENCE) == 0, scene.log.read_text()
    scene.assert_same_model()
    scene.assert_finishes(bmm, ())


def test_in_anchor(scene: Scene, bmm: Bmm) -> None:
    (own,) = [
        entry.key
        for entry in Store.open(scene.store).entries()
        if entry.kind == "anchor" and '"method": "wudi"' in (entry.path / "manifest.json").read_text(encoding="utf-8")
    ]
    scene.back_to("anchor")
    with held(scene.store, "anchor", own) as wanted:
        scene.kill_when(wanted)
    assert not records(scene.store, "anchor")
    scene.assert_finishes(bmm, ("anchor", "search", "evaluate", "publish"))


def test_half_way_through_an_anchor(scene: Scene, bmm: Bmm) -> None:
    # The published Adam schedule takes a while, and fills its draft when it is done.
    slow = {"method": "wudi", "solver": "adam", "steps": 40}
    recipe = change(scene.pico, lambda recipe: recipe.update(anchor=slow))
    other = shutil.copytree(scene.store, scene.store.with_name("other"))
    assert bmm("merge", recipe, "--no-server", "--store", other).code == 0
    unbroken = model_files(scene.pico / "merged")
    shutil.rmtree(scene.pico / "merged")
    scene.kill_when(lambda: list((scene.store / "drafts").glob("anchor-*")))
    assert list((scene.store / "drafts").glob("anchor-*")), "the kill came after the anchor was whole"
    answer = bmm("merge", scene.pico / "recipe.yaml", "--no-server", "--store", scene.store, "--json")
    states = answer.states()
    assert [stage for stage in STAGES if states[stage] == "cached"] == ["experts", "task-vectors", "grams"]
    assert model_files(scene.pico / "merged") == unbroken
    assert_no_halves(scene.store)


def test_in_search(scene: Scene, bmm: Bmm) -> None:
    scene.back_to("search")

    def log() -> bytes:
        found = list((scene.store / "progress").glob("search-*/*.jsonl"))
        return found[0].read_bytes() if found else b""

    # The first line is the study's identity.
    scene.kill_when(lambda: log().count(b"\n") >= 4)
    before = log()
    logged = before.count(b"\n") - 1
    assert 3 <= logged < 6
    # A second kill, later, shows that the log goes on where it stood.
    scene.kill_when(lambda: log().count(b"\n") - 1 > logged)
    assert log().startswith(before)
    assert log() != before
    scene.assert_finishes(bmm, ("search", "evaluate", "publish"))


def test_in_evaluate(scene: Scene, bmm: Bmm) -> None:
    last = newest(scene.store, "predictions")
    scene.back_to("evaluate")
    total = scene.made("predictions")
    before = records(scene.store, "predictions")
    shutil.rmtree(scene.store / "artefacts" / "predictions" / last)
    with held(scene.store, "predictions", last) as wanted:
        scene.kill_when(wanted)
    assert list((scene.store / "drafts").glob("evaluation-*"))
    assert len(before) == total
    scene.assert_finishes(bmm, ("evaluate", "publish"))


def test_in_publish(scene: Scene, bmm: Bmm) -> None:
    model = newest(scene.store, "model")
    scene.back_to("publish")
    with held(scene.store, "model", model) as wanted:
        scene.kill_when(wanted)
    assert not (scene.pico / "merged").exists()
    scene.assert_finishes(bmm, ("publish",))


def test_while_the_output_is_written(scene: Scene, bmm: Bmm) -> None:
    half = scene.pico / ".merged.bmm-new"
    # Figures and report come after the weights, and take a moment.
    scene.kill_when(lambda: (half / "model.safetensors").exists())
    assert half.exists(), "the kill came after the output was whole"
    assert not (scene.pico / "merged").exists()
    scene.assert_finishes(bmm, ())


def test_in_the_flow_with_its_own_server(scene: Scene, bmm: Bmm) -> None:
    model = newest(scene.store, "model")
    scene.back_to("publish")
    with held(scene.store, "model", model) as wanted, scene.started("--server") as process:
        wait_for(wanted, process, scene.log)
        servers = [
            child
            for child in psutil.Process(process.pid).children(recursive=True)
            if any("prefect.server.api.server" in word for word in child.cmdline())
        ]
        assert len(servers) == 1
        kill(process)
        assert not alive(servers[0])
    scene.assert_finishes(bmm, ("publish",))
