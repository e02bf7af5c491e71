"""One Gram run in which everything dies that can: the sum is that of a quiet run, to the last bit."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from listening import Listening

from bmm.errors import ClusterError
from bmm.grams import blocks
from bmm.pipeline import perform_here, run_stages
from bmm.progress import reporting
from bmm.recipe import Recipe
from bmm.sources import fingerprint_inputs
from bmm.stages.request import Result
from bmm.store import Store
from tests.faults.conftest import change
from tests.faults.forge import Forge

pytestmark = pytest.mark.slow

KILLS, SCHEDULERS, SHARDS = 30, 2, 144
BLOCK = 8
"""So many shards are added at a time: often, and in the middle of everything."""
AWAY_SECONDS = 20.0
_PATIENCE = 120.0


class Fire:
    """What goes wrong in a run, in an order and at moments drawn from a seed; a moment is a number of finished shards.

    Args:
        forge: the cluster.
        store: the folder of the run's store.
        seed: of the draw.
    """

    def __init__(self, forge: Forge, store: Path, seed: int) -> None:
        self._forge = forge
        self._store = store
        self._random = random.Random(seed)
        deeds: list[Callable[[], None]] = [self._kill_worker] * KILLS
        deeds += [self._kill_scheduler] * SCHEDULERS + [self._truncate, self._take_away]
        self._random.shuffle(deeds)
        # After the first, so that there is something to truncate; long before the last, so that the run goes on.
        moments = sorted(self._random.randrange(2, SHARDS // 2) for _ in deeds)
        self._plan = list(zip(moments, deeds, strict=True))
        self.done: list[str] = []
        self.left: list[int] = []
        self.over = threading.Event()

    def rage(self) -> None:
        """Do it all, each deed when its moment has come."""
        for moment, deed in self._plan:
            end = time.monotonic() + _PATIENCE
            while self._finished() < moment:
                if self.over.is_set() or time.monotonic() > end:
                    return
                time.sleep(0.005)
            time.sleep(self._random.uniform(0.0, 0.05))
            deed()
            self.left.append(SHARDS - self._finished())

    def _shards(self) -> list[Path]:
        return [path.parent for path in (self._store / "artefacts" / "gram-shard").glob("*/manifest.json")]

    def _finished(self) -> int:
        """Return how many shards have been begun and are not under way, whether or not they have been added since."""
        begun = len(list((self._store / "locks").glob("gram-shard-*.lock")))
        return begun - len(list((self._store / "progress").glob("gram-shard-*")))

    def _kill_worker(self) -> None:
        while not (workers := self._forge.workers()):
            time.sleep(0.005)
        self._random.choice(workers).kill()
        self.done.append("worker")

    def _kill_scheduler(self) -> None:
        self._forge.replace_scheduler(0.3)
        self.done.append("scheduler")

    def _truncate(self) -> None:
        while True:
            # The youngest is added last; there is none for a moment, or it goes while it is looked at.
            with suppress(ValueError, OSError):
                shard = max(self._shards(), key=lambda path: path.stat().st_mtime_ns)
                largest = max((path for path in shard.iterdir()), key=lambda path: path.stat().st_size)
                os.truncate(largest, largest.stat().st_size // 2)
                break
            time.sleep(0.005)
        self.done.append("shard")

    def _take_away(self) -> None:
        elsewhere = self._store.with_name("elsewhere")
        self._store.rename(elsewhere)
        time.sleep(AWAY_SECONDS)
        # Nobody has made another in its place.
        assert not self._store.exists()
        elsewhere.rename(self._store)
        self.done.append("store")


def collected(recipe: Path, store: Path) -> Result:
    """Run the stages up to the Grams in this process."""
    asked = Recipe.from_yaml(recipe)
    stages = ("experts", "task-vectors", "grams")
    return run_stages(asked, fingerprint_inputs(asked), Store.open(store), perform_here, stages)["grams"]


def shards_of(store: Path, result: Result) -> dict[str, int]:
    """Return what the run says of its shards, over all experts."""
    opened = Store.open(store)
    counts = [opened.read(result.reference("experts", name)).provenance["shards"] for name in result.outputs["experts"]]
    return {name: sum(count[name] for count in counts) for name in ("computed", "again", "found")}


def test_grams_are_exact_whatever_dies(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = Listening()
    with Forge(tmp_path, 2) as forge:
        settings: dict[str, Any] = {"scheduler": forge.address, "retry_seconds": 120}
        recipe = change(small, lambda said: said.update(cluster=settings, grams={"shard_rows": 1}))
        quiet = collected(recipe, tmp_path / "quiet")
        assert shards_of(tmp_path / "quiet", quiet) == {"computed": SHARDS, "again": 0, "found": 0}
        monkeypatch.setattr(blocks, "BLOCK", BLOCK)
        fire = Fire(forge, tmp_path / "store", seed=4)
        rage = threading.Thread(target=fire.rage, daemon=True)
        rage.start()
        try:
            with reporting(heard):
                burnt = collected(recipe, tmp_path / "store")
        finally:
            fire.over.set()
            rage.join()
    assert sorted(fire.done) == sorted(["worker"] * KILLS + ["scheduler"] * SCHEDULERS + ["shard", "store"])
    assert min(fire.left) > 0, "the run was over before the fire"
    assert burnt.outputs == quiet.outputs, "the sums differ from the quiet run's"
    counts = shards_of(tmp_path / "store", burnt)
    assert counts["computed"] + counts["found"] == SHARDS
    # At most one for each worker that was killed or was working when the store went, and the one that was damaged.
    assert 1 <= counts["again"] <= KILLS + 2 + 1
    said = f"Gram shards: {counts['computed']} computed, {counts['again']} begun again, {counts['found']} found."
    assert heard.told[-1] == said
    assert sum("has gone away" in line for line in heard.told) >= SCHEDULERS
    assert any(line.startswith("Workers lost: ") for line in heard.told)
    assert any("is not there any more" in line for line in heard.told)


def test_a_scheduler_that_does_not_come_back_is_given_up(small: Path, tmp_path: Path) -> None:
    heard = Listening()
    with Forge(tmp_path, 1) as forge:
        forge.wait()
        settings: dict[str, Any] = {"scheduler": forge.address, "retry_seconds": 2}
        recipe = change(small, lambda said: said.update(cluster=settings, grams={"shard_rows": 2}))

        def end() -> None:
            shards = tmp_path / "store" / "artefacts" / "gram-shard"
            while len(list(shards.glob("*"))) < 3:
                time.sleep(0.01)
            forge.kill_scheduler()

        killer = threading.Thread(target=end, daemon=True)
        killer.start()
        with (
            reporting(heard),
            pytest.raises(ClusterError, match="has gone away and has not come back"),
        ):
            collected(recipe, tmp_path / "store")
        killer.join()
    # What was computed is kept for the next run.
    assert len(list((tmp_path / "store" / "artefacts" / "gram-shard").glob("*/manifest.json"))) >= 3
