from __future__ import annotations

import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertModel

from bmm.errors import CheckpointError, StoreAwayError
from bmm.evaluation.data import Split
from bmm.evaluation.model import TaskModel
from bmm.grams import shards
from bmm.grams.collect import GramSum
from bmm.grams.shards import SHARD_VERSION, ShardRequest, compute_shard, shards_of
from bmm.grams.sums import reduce
from bmm.kinds.texts import TextRow as Row
from bmm.modules.linear import LinearMap
from bmm.sources import fingerprint_model
from bmm.store import Draft, Reference, Store, artefact_key

GROUPS = ("encoder.layer.0.attention.self.query", "encoder.layer.1.output.dense", "pooler.dense")
MAPS = tuple(
    LinearMap(name, 16, 16, name, "other", None, f"{name}.weight", f"{name}.bias").to_json() for name in GROUPS
)
TEXTS = [" ".join(f"w{(index * step) % 60}" for step in range(1, 3 + index % 9)) for index in range(30)]


@pytest.fixture(scope="module", autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


READING = {"kind": "text-classification", "max_length": 16}


@pytest.fixture(scope="module")
def whole(pico_source: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardRequest:
    """All rows of one expert as one shard, in a store of its own."""
    store = Store.open(tmp_path_factory.mktemp("shards") / "store")
    split = Split("calibration", tuple(Row(text, None, 0) for text in TEXTS))

    def make(draft: Draft) -> None:
        (draft.path / "calibration.jsonl").write_text(split.to_jsonl())
        draft.write_json("expert.json", {"kind": "text-classification"})

    data, _ = store.obtain("expert", "0" * 64, make)
    expert = fingerprint_model("experts/task0", pico_source, "the expert")
    return ShardRequest(
        expert_digest=expert.digest,
        split_digest=split.digest,
        start=0,
        stop=len(TEXTS),
        reading=READING,
        batch_size=4,
        maps=MAPS,
        store=store.location,
        expert_path=expert.path,
        data=data.to_json(),
    )


def summed(requests: list[ShardRequest]) -> dict[str, GramSum]:
    store = Store.open(requests[0].store)
    return dict(reduce([store.read(compute_shard(vars(one)).reference) for one in requests], GROUPS))


@settings(max_examples=8, deadline=None)
@given(shard_rows=st.integers(3, 40))
def test_shards_of_any_size_add_up_to_the_whole(whole: ShardRequest, shard_rows: int) -> None:
    one = summed([whole])
    parts = summed(shards_of(whole, len(TEXTS), shard_rows))
    for name in GROUPS:
        assert parts[name].rows == one[name].rows
        difference = (parts[name].total - one[name].total).norm() / one[name].total.norm()
        assert float(difference) < 1e-6, name


@given(rows=st.integers(1, 500), shard_rows=st.integers(1, 200))
def test_every_row_is_in_one_shard(whole: ShardRequest, rows: int, shard_rows: int) -> None:
    cut = shards_of(whole, rows, shard_rows)
    assert [index for part in cut for index in range(part.start, part.stop)] == list(range(rows))
    assert all(0 < part.stop - part.start <= shard_rows for part in cut)
    assert len({part.key() for part in cut}) == len(cut)


def test_a_shard_is_computed_once_and_the_same_anywhere(whole: ShardRequest, tmp_path: Path) -> None:
    request = replace(whole, start=3, stop=11)
    first = compute_shard(vars(request))
    assert first.attempts == 1
    folder = Path(whole.store) / "artefacts" / "gram-shard" / first.reference.key
    inode = (folder / "sums-00000.safetensors").stat().st_ino
    assert compute_shard(vars(request)) == replace(first, attempts=0)
    assert (folder / "sums-00000.safetensors").stat().st_ino == inode
    elsewhere = Store.open(tmp_path / "other")
    rows = Store.open(whole.store).read(Reference.from_json(whole.data)).file("calibration.jsonl").read_text()

    def copy(draft: Draft) -> None:
        (draft.path / "calibration.jsonl").write_text(rows)
        draft.write_json("expert.json", {"kind": "text-classification"})

    data, _ = elsewhere.obtain("expert", "1" * 64, copy)
    again = compute_shard(vars(replace(request, store=elsewhere.location, data=data.to_json())))
    assert again == first


def test_a_damaged_shard_is_computed_again(whole: ShardRequest) -> None:
    request = replace(whole, start=12, stop=20)
    first = compute_shard(vars(request))
    file = Path(whole.store) / "artefacts" / "gram-shard" / first.reference.key / "sums-00000.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    assert compute_shard(vars(request)) == first
    assert file.read_bytes() == content


def test_attempts_that_were_killed_are_counted(whole: ShardRequest) -> None:
    request = replace(whole, start=21, stop=22)
    killed = Path(whole.store) / "progress" / f"gram-shard-{request.key()}"
    killed.mkdir(parents=True)
    (killed / "attempts").write_bytes(b"..")
    assert compute_shard(vars(request)).attempts == 3
    assert not killed.exists()


def test_a_store_that_is_away_is_told_and_not_made_anew(whole: ShardRequest) -> None:
    request = replace(whole, start=22, stop=23)
    root = Path(whole.store)
    elsewhere = root.rename(root.with_name("elsewhere"))
    try:
        with pytest.raises(StoreAwayError, match=f"the store {root} is not there any more"):
            compute_shard(vars(request))
        assert not root.exists()
    finally:
        elsewhere.rename(root)
    assert compute_shard(vars(request)).attempts == 1


def test_the_key_is_made_of_what_decides_the_result_and_of_nothing_else(whole: ShardRequest) -> None:
    changes = {
        "expert_digest": "x",
        "split_digest": "x",
        "start": 1,
        "stop": 2,
        "reading": {**READING, "max_length": 8},
        "batch_size": 5,
        "maps": MAPS[:1],
        "tokens": 4,
    }
    keys = {replace(whole, **{name: value}).key() for name, value in changes.items()}  # type: ignore[arg-type]
    assert len(keys | {whole.key()}) == len(changes) + 1
    assert replace(whole, store="/b", expert_path="/c", data={}, streamed=True).key() == whole.key()
    one, two = (replace(whole, tokens=4, tokens_seed=seed).key() for seed in (0, 1))
    assert one != two
    # Shards that were made before tokens could be sampled are found as they were.
    assert replace(whole, tokens_seed=1).key() == whole.key()
    names = ("expert_digest", "split_digest", "start", "stop", "reading", "batch_size", "maps")
    before = {name: getattr(whole, name) for name in names}
    assert whole.key() == artefact_key("gram-shard", SHARD_VERSION, before, {})


def test_a_sample_of_the_tokens_does_not_depend_on_who_draws_it(whole: ShardRequest) -> None:
    cut = shards_of(replace(whole, tokens=3, tokens_seed=7), len(TEXTS), 12)
    found = summed(cut)
    assert found["pooler.dense"].rows == len(TEXTS)
    assert found[GROUPS[0]].rows == found[GROUPS[1]].rows == 3 * len(TEXTS)
    for request in cut:
        assert Store.open(whole.store).discard("gram-shard", request.key())
    again = summed([replace(request, streamed=True) for request in cut[::-1]][::-1])
    assert all(torch.equal(found[name].total, again[name].total) for name in GROUPS)


def test_more_tokens_than_there_are_change_no_byte(whole: ShardRequest) -> None:
    plain, sampled = summed([whole]), summed([replace(whole, tokens=16)])
    for name in GROUPS:
        assert sampled[name].rows == plain[name].rows
        assert torch.equal(sampled[name].total, plain[name].total)


def test_a_streamed_expert_gives_the_same_bytes(whole: ShardRequest, tmp_path: Path) -> None:
    request = replace(whole, start=0, stop=13)
    first = compute_shard(vars(request))
    assert Store.open(whole.store).discard("gram-shard", request.key())
    again = compute_shard(vars(replace(request, streamed=True)))
    assert again.reference == first.reference


def test_an_expert_that_was_changed_meanwhile_is_refused(whole: ShardRequest) -> None:
    with pytest.raises(CheckpointError, match="was changed while the merge was running"):
        compute_shard(vars(replace(whole, expert_digest="0" * 64)))


def test_computing_a_shard_leaves_the_threads_of_its_process_alone(whole: ShardRequest) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        compute_shard(vars(replace(whole, start=20, stop=24)))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_one_expert_is_in_memory_at_a_time(
    whole: ShardRequest, pico_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = fingerprint_model("experts/task1", pico_source, "the expert")
    next_one = replace(whole, expert_digest=other.digest, expert_path=other.path)
    load, seen = shards._load, []

    def looked_at(*which: Any) -> TaskModel:
        gc.collect()
        seen.append(sum(type(thing) is BertModel for thing in gc.get_objects()))
        return load(*which)

    monkeypatch.setattr(shards, "_load", looked_at)
    shards.forget()
    # What earlier tests left behind is counted by nobody.
    gc.collect()
    already = sum(type(thing) is BertModel for thing in gc.get_objects())
    for place, request in enumerate((whole, next_one, whole)):
        compute_shard(vars(replace(request, store=moved(request, tmp_path / str(place)))))
    assert seen == [already] * 3
    shards.forget()
    gc.collect()
    assert sum(type(thing) is BertModel for thing in gc.get_objects()) == already


def test_a_worker_of_several_threads_computes_what_one_of_one_does(whole: ShardRequest, tmp_path: Path) -> None:
    answers = []
    for threads in (1, 4):
        place = moved(whole, tmp_path / str(threads))
        requests = [vars(replace(shard, store=place)) for shard in shards_of(whole, len(TEXTS), 3)]
        with ThreadPoolExecutor(threads) as pool:
            answers.append(list(pool.map(compute_shard, requests)))
    assert answers[0] == answers[1]
    assert {answer.attempts for answer in answers[1]} == {1}


def moved(request: ShardRequest, folder: Path) -> str:
    """Return another store that has the rows of a request's."""
    if not folder.exists():
        copytree(request.store, folder, ignore=lambda _, names: [name for name in names if name == "gram-shard"])
    return str(folder)
