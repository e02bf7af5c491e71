from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gram_shards
import pytest
import torch
from gram_shards import SIZES, in_order, listed, put, requests
from hypothesis import given, settings
from hypothesis import strategies as st
from listening import Listening
from store_benches import ObjectBench

from bmm.grams import blocks, sums
from bmm.grams.sums import SUM, RunningSum, SumLostError, sum_keys
from bmm.progress import reporting
from bmm.store import Store


@pytest.fixture(autouse=True)
def _blocks_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 4)


def begun(store: Store, count: int, there: int | None = None) -> RunningSum:
    """Return the sum of so many shards, of which some are there, nothing added yet."""
    running = RunningSum(store, "news", requests(store, count))
    for request in running.shards[:there]:
        put(store, request)
    running.resume()
    return running


def add_all(running: RunningSum) -> None:
    while (block := running.block()) is not None:
        running.add(block)


def assert_right(running: RunningSum) -> None:
    found, expected = dict(running.total()), in_order(len(running.shards))
    assert list(found) == sorted(SIZES)
    for name in SIZES:
        assert found[name].total.numpy().tobytes() == expected[name].numpy().tobytes()
        assert found[name].rows == sum(range(1, len(running.shards) + 1))


@settings(max_examples=20, deadline=None)
@given(count=st.integers(1, 14), block=st.integers(1, 7), bytes_=st.sampled_from([1, 10**6]), data=st.data())
def test_the_bytes_are_those_of_one_sum_in_order(count: int, block: int, bytes_: int, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(count)))
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK", block)
        patch.setattr(sums, "FILE_BYTES", bytes_)
        store = Store.open(Path(folder) / "store")
        running = RunningSum(store, "news", requests(store, count))
        running.resume()
        assert running.missing() == list(range(count))
        for index in order:
            running.note(index, put(store, running.shards[index]), 1)
            add_all(running)
        summed = (count - 1) // block * block
        assert listed(store) == (count - summed, min(summed, 1))
        assert_right(running)
        assert running.begun == [1] * count
        running.clear()
        assert listed(store) == (0, 0)


def test_the_cut_into_blocks_is_not_in_a_sums_name() -> None:
    keys = [f"shard-{number}" for number in range(9)]
    assert sum_keys(keys[:5]) == sum_keys(keys)[:5]
    assert len({*sum_keys(keys), *sum_keys(keys[::-1])}) == 18


def test_a_sum_goes_on_where_another_run_has_left_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(tmp_path / "store")
    add_all(begun(store, 11, 9))
    assert listed(store) == (1, 1)
    # A version with other blocks.
    monkeypatch.setattr(blocks, "BLOCK", 2)
    running = RunningSum(store, "news", requests(store, 11))
    running.resume()
    assert running.missing() == [9, 10]
    for index in (9, 10):
        running.note(index, put(store, running.shards[index]), 1)
        add_all(running)
    assert listed(store) == (1, 1)
    assert_right(running)
    assert running.begun == [0] * 9 + [1] * 2
    # Another expert's are its own.
    other = RunningSum(store, "other", requests(store, 11, salt=1))
    other.resume()
    assert other.missing() == list(range(11))
    other.clear()
    assert listed(store) == (1, 1)


def test_sums_go_through_a_bucket(objects: ObjectBench) -> None:
    store = objects.open()
    add_all(begun(store, 10, 7))
    assert listed(store) == (3, 1)
    objects.forget_copies()
    running = begun(objects.open(), 10)
    assert_right(running)
    add_all(running)
    assert listed(store) == (2, 1)
    assert_right(running)
    running.clear()
    assert not [path for path in objects.listed() if path.startswith("artefacts/gram-")]


def test_a_block_is_not_added_before_those_that_come_first(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store")
    running = begun(store, 11)
    first, second = running.block(), running.block()
    assert first is not None
    assert second is not None
    running.add(second)
    assert listed(store) == (11, 0)
    for block in (first, second, second):
        running.add(block)
    assert listed(store) == (3, 1)
    assert_right(running)


def spoil(store: Store, cut: Callable[[bytes], bytes]) -> None:
    (folder,) = (store.root / "artefacts" / SUM).iterdir()
    file = folder / "sums-00000.safetensors"
    file.write_bytes(cut(file.read_bytes()))


@pytest.mark.parametrize("cut", [lambda content: content[:-1], lambda content: content[:-1] + b"x"])
def test_a_damaged_sum_is_not_resumed(tmp_path: Path, cut: Callable[[bytes], bytes]) -> None:
    store = Store.open(tmp_path / "store")
    add_all(begun(store, 11))
    spoil(store, cut)
    heard = Listening()
    with reporting(heard):
        running = RunningSum(Store.open(store.root), "news", requests(store, 11))
        running.resume()
    assert heard.told == ["The sum of the first 8 Gram shards of news is damaged; they are computed again."]
    assert running.missing() == list(range(8))
    assert listed(store) == (3, 0)
    for index in running.missing():
        running.note(index, put(store, running.shards[index]), 1)
    add_all(running)
    assert_right(running)


def test_a_sum_damaged_meanwhile_ends_the_adding_and_not_the_shards(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store")
    running = begun(store, 11)
    first, second = running.block(), running.block()
    assert first is not None
    assert second is not None
    running.add(first)
    spoil(store, lambda content: content[:-1])
    heard = Listening()
    with reporting(heard):
        running.add(second)
        assert running.lost
        assert running.block() is None
        running.add(second)
    assert heard.told == ["The sum of the first 4 Gram shards of news is damaged; they are computed again."]
    assert listed(store) == (7, 0)
    running.resume()
    assert (running.lost, running.missing()) == (False, [0, 1, 2, 3])
    for index in running.missing():
        running.note(index, put(store, running.shards[index]), 2)
    add_all(running)
    spoil(store, lambda content: content[:-1])
    with pytest.raises(SumLostError, match="damaged file"):
        dict(running.total())
    assert running.begun == [2] * 4 + [0] * 7


def killed_at(write: int, work: Callable[[], Any]) -> bool:
    """Do some work in a fork that is killed at its write of that number; return whether it was."""
    child = os.fork()
    if not child:
        count = 0

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count
            writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes or event in {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}:
                count += 1
                if count == write:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(watch)
            work()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def test_a_kill_at_any_write_loses_nothing(tmp_path: Path) -> None:
    writes = random.Random(4).sample(range(1, 120), 12)
    kills = 0
    for place, write in enumerate(writes):
        store = Store.open(tmp_path / str(place))
        running = begun(store, 11)
        kills += killed_at(write, lambda running=running: add_all(running))
        after = RunningSum(Store.open(store.root), "news", requests(store, 11))
        after.resume()
        assert after.missing() == [], f"killed at write {write}"
        add_all(after)
        assert listed(store) == (3, 1), f"killed at write {write}"
        assert_right(after)
        after._store.remove_leftovers()
        assert not list((store.root / "drafts").iterdir())
        assert store.verify() == []
    assert kills >= 6


def test_numbers_show_the_order_in_which_they_are_added() -> None:
    there, back = in_order(9), gram_shards.numbers(8)
    for place in range(7, -1, -1):
        back = {name: back[name] + part for name, part in gram_shards.numbers(place).items()}
    assert not any(torch.equal(there[name], back[name]) for name in SIZES)
