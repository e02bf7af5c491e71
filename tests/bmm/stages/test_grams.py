"""The sum of many shards while they are computed: the stage's own way, without Dask."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gram_shards import listed
from listening import Listening
from nights import ask_here, compute_here

from bmm.cluster.settings import ClusterSettings
from bmm.evaluation.data import Split
from bmm.grams import blocks
from bmm.grams.shards import SHARD
from bmm.grams.sums import SUM
from bmm.kinds.texts import TextRow
from bmm.modules.linear import LinearMap
from bmm.progress import reporting
from bmm.sources import Expert, fingerprint_model
from bmm.stages import grams
from bmm.stages.request import Work
from bmm.store import Draft, Reference, Store

ROWS, BLOCK = 22, 5
SETTINGS = ClusterSettings(retry_seconds=5)
GROUPS = ("encoder.layer.0.attention.self.query", "encoder.layer.1.output.dense", "pooler.dense")


class Bench:
    """A store, and one expert's Gram matrices in it, a row a shard."""

    def __init__(self, folder: Path, pico: Path) -> None:
        self.store = Store.open(folder / "store")
        self._expert = Expert(
            "news",
            fingerprint_model("experts/task0", pico, "the expert"),
            {"kind": "text-classification", "max_length": 16},
            {},
        )
        self.at_landing: Callable[[int], None] = lambda _: None

    def job(self, work: Work) -> grams.GramJob:
        rows = [" ".join(f"w{(index * step) % 60}" for step in range(1, 3 + index % 9)) for index in range(ROWS)]
        split = Split("calibration", tuple(TextRow(text, None, 0) for text in rows))

        def make(draft: Draft) -> None:
            (draft.path / "calibration.jsonl").write_text(split.to_jsonl(), encoding="utf-8")
            draft.write_json("expert.json", {"kind": "text-classification"})

        data = work.obtain("expert", {"rows": ROWS}, make)
        maps = [LinearMap(name, 16, 16, name, "other", None, f"{name}.weight", f"{name}.bias") for name in GROUPS]
        return grams.plan_job(work, self._expert, data, maps, 1, 4)

    def made(self, *, fresh: bool = False) -> tuple[Reference, dict[str, int]]:
        """Run the stage, `at_landing` being called before each answer is taken; return what it says."""

        def asked(cluster: Any, function: Any, requests: Any, *more: Any, landed: Any, **options: Any) -> None:
            def noted(place: int, answer: Any) -> None:
                self.at_landing(place)
                landed(place, answer)

            ask_here(cluster, function, requests, *more, landed=noted, **options)

        with pytest.MonkeyPatch.context() as patch:
            compute_here(patch)
            patch.setattr("bmm.stages.grams.run_all", asked)
            work = Work(Store.open(self.store.root, fresh=fresh))
            reference = grams.compute(work, [self.job(work)], SETTINGS)["news"]
        assert listed(self.store) == (0, 0)
        assert not list((self.store.root / "drafts").iterdir())
        return reference, self.store.read(reference).provenance["shards"]


@pytest.fixture(scope="module")
def plain(pico_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """What comes of the sum over all shards at once."""
    assert blocks.BLOCK > ROWS
    return Bench(tmp_path_factory.mktemp("plain"), pico_source).made()[0]


@pytest.fixture
def bench(plain: Reference, pico_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(blocks, "BLOCK", BLOCK)
    return Bench(tmp_path, pico_source)


def test_running_sums_change_no_byte_and_bound_what_is_there(bench: Bench, plain: Reference) -> None:
    seen: list[tuple[int, int]] = []
    bench.at_landing = lambda _: seen.append(listed(bench.store))
    assert bench.made() == (plain, {"computed": ROWS, "again": 0, "found": 0})
    assert max(shards + sums for shards, sums in seen) <= blocks.most_held([ROWS], 1)
    assert max(sums for _, sums in seen) >= 1


def test_a_shard_damaged_before_it_is_added_is_made_again(bench: Bench, plain: Reference) -> None:
    def truncate(place: int) -> None:
        if place == 7:
            newest = max((bench.store.root / "artefacts" / SHARD).iterdir(), key=lambda path: path.stat().st_mtime_ns)
            (newest / "sums-00000.safetensors").write_bytes(b"")

    bench.at_landing = truncate
    assert bench.made() == (plain, {"computed": ROWS, "again": 1, "found": 0})


def test_shards_of_a_sum_that_was_damaged_are_computed_again(bench: Bench, plain: Reference) -> None:
    spoilt: list[int] = []

    def truncate(place: int) -> None:
        if place == 3 * BLOCK - 1 and not spoilt:
            # Two blocks have been added, and the third is whole with this shard.
            while listed(bench.store) != (BLOCK, 1):
                time.sleep(0.001)
            (sums,) = (bench.store.root / "artefacts" / SUM).glob("*/sums-*")
            sums.write_bytes(b"")
            spoilt.append(place)

    bench.at_landing = truncate
    heard = Listening()
    with reporting(heard):
        reference, counts = bench.made()
    assert (reference, counts) == (plain, {"computed": ROWS, "again": 2 * BLOCK, "found": 0})
    assert heard.told == [
        f"The sum of the first {2 * BLOCK} Gram shards of news is damaged; they are computed again.",
        f"Gram shards: {ROWS} computed, {2 * BLOCK} begun again, 0 found.",
    ]


def stop(_: int) -> None:
    raise InterruptedError


def test_what_an_interrupted_run_has_summed_is_found(bench: Bench, plain: Reference) -> None:
    bench.at_landing = lambda place: stop(place) if place == 14 else None
    with pytest.raises(InterruptedError):
        bench.made()
    shards, sums = listed(bench.store)
    assert sums <= 1
    assert shards < 15
    bench.at_landing = lambda _: None
    assert bench.made() == (plain, {"computed": ROWS - 15, "again": 0, "found": 15})


def test_a_fresh_run_takes_no_old_sum(bench: Bench, plain: Reference) -> None:
    bench.at_landing = lambda place: stop(place) if place == 14 else None
    with pytest.raises(InterruptedError):
        bench.made()
    assert listed(bench.store)[1] == 1
    bench.at_landing = lambda _: None
    assert bench.made(fresh=True) == (plain, {"computed": ROWS, "again": 0, "found": 0})


def test_an_error_while_adding_ends_the_run_and_loses_no_shard(bench: Bench, plain: Reference) -> None:
    blocked = bench.store.root / "artefacts" / SUM
    blocked.parent.mkdir(parents=True)
    # A file where the sums' folder should be.
    blocked.write_text("")
    with pytest.raises(NotADirectoryError):
        bench.made()
    assert not list((bench.store.root / "drafts").iterdir())
    blocked.unlink()
    there = len(bench.store.keys(SHARD))
    assert there >= BLOCK
    assert bench.made() == (plain, {"computed": ROWS - there, "again": 0, "found": there})


def killed_after(bench: Bench, shards: int) -> None:
    def die(place: int) -> None:
        if place == shards:
            os.kill(os.getpid(), signal.SIGKILL)

    bench.at_landing = die
    bench.made()


def test_a_killed_run_goes_on_from_its_last_sum(bench: Bench, plain: Reference) -> None:
    process = multiprocessing.get_context("fork").Process(target=killed_after, args=(bench, 17))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    shards, sums = listed(bench.store)
    assert sums >= 1
    assert shards < 18
    assert bench.made() == (plain, {"computed": ROWS - 18, "again": 0, "found": 18})
