"""Clearing up stores of every kind while others are at work in them."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from pathlib import Path

import pytest
from object_server import FaultyProxy
from store_benches import Bench, ObjectBench, answer, child, fill, until

from bmm.pruning import prune
from bmm.retention import Retention
from bmm.stages.request import Work
from bmm.store import Draft, Store
from bmm.stores.at_work import at_work, used_by_the_living

EVERYTHING = Retention(older_than_days=0)


@pytest.fixture
def chain(store: Store) -> Store:
    """A store with rows, a walk that was asked for on the way to the model `champion`, and another model."""
    work = Work(store)
    rows = work.obtain("rows", {"from": "here"}, fill)

    def make(draft: Draft) -> None:
        work.obtain("walk", {"rows": rows.digest}, lambda walk: walk.write_json("walk.json", 1))
        draft.write_json("model.json", "champion")

    work.obtain("model", {"rows": rows.to_json()}, make)
    work.obtain("model", {"rows": "other"}, lambda draft: draft.write_json("model.json", "other"))
    return store


def digest_of(store: Store, content: str) -> str:
    """The digest of the model that holds this."""
    found = [store.find("model", key) for key in store.keys("model")]
    (digest,) = [one.digest for one in found if one and store.read(one).read_json("model.json") == content]
    return digest


def kinds(store: Store) -> list[str]:
    return [entry.kind for entry in store.entries()]


def test_a_model_stays_with_all_that_it_was_made_from(bench: Bench, chain: Store) -> None:
    champion = digest_of(chain, "champion")
    would = prune(chain, EVERYTHING, {champion}, dry_run=True)
    assert [one.entry.kind for one in would.going] == ["model"]
    assert kinds(chain) == ["model", "model", "rows", "walk"]
    done = prune(bench.open(), EVERYTHING, {champion})
    assert (done.going, done.protected) == (would.going, would.protected)
    assert {kind for kind, _ in done.protected} == {"rows", "walk", "model"}
    assert kinds(chain) == ["model", "rows", "walk"]
    assert done.left_bytes == sum(entry.bytes for entry in chain.entries())
    assert digest_of(chain, "champion") == champion
    # What stays in any case may be more than is allowed, and that is told.
    full = prune(chain, Retention(max_bytes="1B"), {champion})
    assert (full.going, full.over_bytes) == ([], done.left_bytes - 1)
    assert len(prune(chain, EVERYTHING, set()).going) == 3
    assert kinds(chain) == []


def test_what_a_living_run_has_used_stays_until_it_ends(bench: Bench, chain: Store) -> None:
    run = """
        from bmm.stores.at_work import at_work
        store = Store.open(sys.argv[1])
        with at_work(store):
            print("at work", flush=True)
            sys.stdin.read()
    """
    living = child(run, bench.location, stdin=subprocess.PIPE)
    assert living.stdout is not None
    assert living.stdout.readline() == "at work\n"
    assert used_by_the_living(chain) is not None
    assert prune(chain, EVERYTHING, set()).going == []
    answer(living)
    assert used_by_the_living(chain) is None
    assert len(prune(chain, EVERYTHING, set()).going) == 4


def test_a_killed_run_holds_nothing_back(bench: Bench, chain: Store) -> None:
    die = """
        import signal
        from bmm.stores.at_work import at_work
        with at_work(Store.open(sys.argv[1])):
            os.kill(os.getpid(), signal.SIGKILL)
    """
    child(die, bench.location).communicate(timeout=60)
    assert used_by_the_living(chain) is None
    assert len(prune(chain, EVERYTHING, set()).going) == 4


def test_runs_at_work_are_told_apart(store: Store) -> None:
    assert used_by_the_living(store) is None
    with at_work(store), at_work(store):
        assert len(store.living("at-work")) == 2
    assert store.living("at-work") == []


def test_what_was_used_since_the_listing_stays(chain: Store) -> None:
    (entry,) = [entry for entry in chain.entries() if entry.kind == "rows"]
    assert not chain.discard("rows", entry.key, used_since=entry.used - 10)
    assert chain.discard("rows", entry.key, used_since=entry.used)


def test_old_progress_of_nobody_goes(store: Store) -> None:
    progress = store.root / "progress"
    for key in ("a" * 64, "b" * 64, "c" * 64):
        (progress / f"some-thing-{key}").mkdir(parents=True)
        (progress / f"some-thing-{key}" / "log").write_text("halfway")
    for key in ("a" * 64, "b" * 64):
        for path in (progress / f"some-thing-{key}" / "log", progress / f"some-thing-{key}"):
            os.utime(path, (1000, 1000))
    store.obtain("another", "d" * 64, fill)
    lock = store.root / "locks" / f"another-{'d' * 64}.lock"
    os.utime(lock, (1000, 1000))
    with store.locked("some-thing", "b" * 64):
        os.utime(store.root / "locks" / f"some-thing-{'b' * 64}.lock", (1000, 1000))
        prune(store, Retention(max_bytes="1GB"), set())
        assert len(list(progress.iterdir())) == 3
        assert lock.exists()
        prune(store, Retention(older_than_days=1), set())
        assert (store.root / "locks" / f"some-thing-{'b' * 64}.lock").exists()
    assert not lock.exists()
    assert sorted(path.name[-1] for path in progress.iterdir()) == ["b", "c"]


def test_who_may_only_read_a_bucket_works_without_a_mark(objects: ObjectBench, proxy: FaultyProxy) -> None:
    proxy.choose = lambda method, _: "403" if method == "PUT" else None
    with at_work(objects.open()):
        assert proxy.faults
        assert objects.listed() == []


def test_a_lock_whose_file_is_removed_is_still_held_by_one(store: Store) -> None:
    inside, most, rounds = [0], [0], 60
    ended = threading.Event()

    def work() -> None:
        for _ in range(rounds):
            with store.locked("thing", "a" * 64):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0.001)
                inside[0] -= 1

    def clear() -> None:
        while not ended.is_set():
            store.remove_traces(time.time() + 60)

    workers = [threading.Thread(target=work) for _ in range(3)]
    clearing = threading.Thread(target=clear)
    for thread in (*workers, clearing):
        thread.start()
    for thread in workers:
        thread.join(60)
    ended.set()
    clearing.join(60)
    assert most == [1]


def test_a_run_on_another_machine_is_seen_in_the_bucket(
    objects: ObjectBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = objects.open()
    here.obtain("thing", "0" * 64, fill)
    run = """
        from bmm.stores.at_work import at_work
        with at_work(Store.open(sys.argv[1])):
            print("at work", flush=True)
            sys.stdin.read()
    """
    elsewhere = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "elsewhere")}
    living = child(run, objects.location, stdin=subprocess.PIPE, env=elsewhere)
    assert living.stdout is not None
    assert living.stdout.readline() == "at work\n"
    until(lambda: [one for one in objects.listed() if one.startswith("leases/at-work-")])
    assert prune(here, EVERYTHING, set()).going == []
    answer(living)
    assert [one.entry.kind for one in prune(here, EVERYTHING, set()).going] == ["thing"]
