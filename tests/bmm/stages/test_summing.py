from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from gram_shards import SIZES, in_order, listed, put, requests
from listening import Listening

from bmm.errors import StoreAwayError
from bmm.grams import blocks
from bmm.grams.sums import SUM, RunningSum
from bmm.progress import reporting
from bmm.stages.summing import Summing
from bmm.store import Store

COUNT = 30


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(blocks, "BLOCK", 4)
    return Store.open(tmp_path / "store")


@pytest.fixture
def running(store: Store) -> RunningSum:
    made = RunningSum(store, "news", requests(store, COUNT))
    made.resume()
    return made


def hand_in(running: RunningSum, store: Store, indices: range) -> None:
    for index in indices:
        running.note(index, put(store, running.shards[index]), 1)


def one_by_one(running: RunningSum, store: Store, summing: Summing, indices: range) -> None:
    for index in indices:
        hand_in(running, store, range(index, index + 1))
        summing.take(running)


def assert_right(running: RunningSum) -> None:
    expected = in_order(COUNT)
    found = dict(running.total())
    assert all(found[name].total.numpy().tobytes() == expected[name].numpy().tobytes() for name in SIZES)


def test_shards_go_as_they_come(store: Store, running: RunningSum) -> None:
    most = 0
    with Summing(1.0) as summing:
        for index in range(COUNT):
            hand_in(running, store, range(index, index + 1))
            summing.take(running)
            shards, sums = listed(store)
            most = max(most, shards + sums)
    assert most <= blocks.most_held([COUNT], 1)
    assert listed(store) == (2, 1)
    assert_right(running)


def test_a_store_that_is_away_is_waited_for(store: Store, running: RunningSum) -> None:
    hand_in(running, store, range(COUNT))
    elsewhere = store.root.rename(store.root.with_name("elsewhere"))
    heard = Listening()

    def come_back() -> None:
        while not heard.told:
            time.sleep(0.01)
        # Nobody has made another in its place.
        elsewhere.rename(store.root)

    back = threading.Thread(target=come_back, daemon=True)
    back.start()
    with reporting(heard), Summing(60.0) as summing:
        summing.take(running)
    back.join()
    assert heard.told == [f"the store {store.root} is not there any more; is its disk mounted? Trying again for 60 s."]
    assert listed(store) == (2, 1)
    assert_right(running)


def test_a_store_that_stays_away_ends_the_adding(store: Store, running: RunningSum) -> None:
    hand_in(running, store, range(COUNT))
    elsewhere = store.root.rename(store.root.with_name("elsewhere"))
    with pytest.raises(StoreAwayError, match="is not there any more"), Summing(0.0) as summing:
        summing.take(running)
    assert not store.root.exists()
    elsewhere.rename(store.root)
    running.resume()
    assert running.missing() == []
    assert_right(running)


def test_an_error_of_the_threads_comes_with_the_next_shard(store: Store, running: RunningSum) -> None:
    # A file where the sums' folder should be.
    (store.root / "artefacts" / SUM).write_text("")
    with Summing(1.0) as summing:
        with pytest.raises(NotADirectoryError):
            one_by_one(running, store, summing, range(COUNT))
        (store.root / "artefacts" / SUM).unlink()
    assert not list((store.root / "drafts").iterdir())
    assert listed(store)[1] == 0
    running.resume()
    for index in running.missing():
        hand_in(running, store, range(index, index + 1))
    assert_right(running)


def test_an_error_of_the_callers_ends_the_adding(
    store: Store, running: RunningSum, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BEHIND", COUNT)
    hand_in(running, store, range(COUNT))
    store.root.rename(elsewhere := store.root.with_name("elsewhere"))

    def interrupted() -> None:
        with Summing(3600.0) as summing:
            summing.take(running)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    # It does not go on waiting for the store.
    elsewhere.rename(store.root)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("bmm-sums")]
    running.resume()
    assert running.missing() == []
    assert_right(running)
