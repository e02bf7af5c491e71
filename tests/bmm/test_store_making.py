"""The contract of a store, for every kind of place: how artefacts are made, by several at once, by some that die."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest
from store_benches import KEY, Bench, answer, child, drafts, fill, refuse, until

from bmm.errors import ArtefactDamagedError, DataError
from bmm.store import Draft, Store, artefact_key


def test_fresh_makes_everything_anew_but_once(bench: Bench, store: Store) -> None:
    store.obtain("thing", KEY, fill)
    (store.root / "progress" / f"thing-{KEY}").mkdir(parents=True)
    (store.root / "progress" / f"thing-{KEY}" / "log").write_text("of an earlier run")
    fresh = bench.open(fresh=True)
    seen: list[bool] = []

    def make(draft: Draft) -> None:
        seen.append(draft.progress.exists())
        fill(draft)

    assert fresh.obtain("thing", KEY, make)[1] is False
    assert fresh.obtain("thing", KEY, refuse)[1] is True
    assert seen == [False]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(3)])
def test_a_make_that_fails_leaves_nothing(store: Store, error: BaseException) -> None:
    def make(draft: Draft) -> None:
        fill(draft)
        raise error

    with pytest.raises(type(error)):
        store.obtain("thing", KEY, make)
    assert store.find("thing", KEY) is None
    assert drafts(store) == []
    assert store.entries() == []
    assert store.obtain("thing", KEY, fill)[1] is False


def test_a_failed_replacement_leaves_the_old_artefact(bench: Bench, store: Store) -> None:
    reference, _ = store.obtain("thing", KEY, fill)
    with pytest.raises(AssertionError):
        store.obtain("thing", KEY, refuse, replace=True)
    assert bench.open().find("thing", KEY) == reference


def test_progress_survives_a_failure_and_ends_with_the_artefact(store: Store) -> None:
    def first(draft: Draft) -> None:
        draft.progress.mkdir(parents=True)
        (draft.progress / "log").write_text("halfway")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        store.obtain("thing", KEY, first)
    seen: list[str] = []
    store.obtain("thing", KEY, lambda draft: seen.append((draft.progress / "log").read_text()))
    assert seen == ["halfway"]
    assert not list((store.root / "progress").iterdir())


def test_two_processes_that_want_the_same_artefact_make_it_once(bench: Bench, tmp_path: Path) -> None:
    code = """
        location, key, tries = sys.argv[1:]
        def make(draft):
            Path(tries, str(os.getpid())).write_text("")
            time.sleep(0.5)
            draft.write_json("value.json", 1)
        while not Path(tries, "go").exists():
            time.sleep(0.005)
        reference, cached = Store.open(location).obtain("thing", key, make)
        print(reference.digest, cached)
    """
    tries = tmp_path / "tries"
    tries.mkdir()
    racers = [child(code, bench.location, KEY, str(tries)) for _ in range(3)]
    (tries / "go").write_text("")
    answers = [answer(racer).split() for racer in racers]
    assert len(list(tries.iterdir())) == 2
    assert len({digest for digest, _ in answers}) == 1
    assert sorted(cached for _, cached in answers) == ["False", "True", "True"]


def test_a_killed_process_leaves_no_artefact_and_its_progress_only(bench: Bench, store: Store) -> None:
    code = """
        def make(draft):
            draft.write_json("value.json", 1)
            draft.progress.mkdir(parents=True)
            (draft.progress / "log").write_text("halfway")
            os.kill(os.getpid(), signal.SIGKILL)
        Store.open(sys.argv[1]).obtain("thing", sys.argv[2], make)
    """
    process = child(code, bench.location, KEY)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert store.find("thing", KEY) is None
    assert store.entries() == []
    left = drafts(store)
    assert len(left) == 1
    seen: list[str] = []

    def make(draft: Draft) -> None:
        assert not left[0].exists()
        seen.append((draft.progress / "log").read_text())
        fill(draft)

    assert store.obtain("thing", KEY, make)[1] is False
    assert seen == ["halfway"]
    assert drafts(store) == []


def test_leftovers_of_the_dead_are_removed_and_drafts_of_the_living_kept(bench: Bench, store: Store) -> None:
    other = artefact_key("other-kind", 1, {}, {})
    die = """
        def make(draft):
            os.kill(os.getpid(), signal.SIGKILL)
        Store.open(sys.argv[1]).obtain("thing", sys.argv[2], make)
    """
    wait = """
        def make(draft):
            draft.write_json("value.json", 1)
            sys.stdin.read()
        print(Store.open(sys.argv[1]).obtain("other-kind", sys.argv[2], make)[0].key)
    """
    child(die, bench.location, KEY).communicate(timeout=60)
    living = child(wait, bench.location, other, stdin=subprocess.PIPE)
    until(lambda: list((store.root / "drafts").glob("other-kind-*/value.json")))
    assert store.remove_leftovers() == 1
    assert [path.name.rsplit("-", 1)[0] for path in drafts(store)] == [f"other-kind-{other}"]
    assert store.remove_leftovers() == 0
    assert answer(living) == other
    assert store.find("other-kind", other) is not None


def test_an_artefact_at_work_on_is_not_removed(bench: Bench, store: Store) -> None:
    reference, _ = store.obtain("thing", KEY, fill)
    wait = """
        def make(draft):
            draft.write_json("value.json", 1)
            sys.stdin.read()
        Store.open(sys.argv[1]).obtain("thing", sys.argv[2], make, replace=True)
    """
    living = child(wait, bench.location, KEY, stdin=subprocess.PIPE)
    until(lambda: list((store.root / "drafts").glob("*/value.json")))
    assert store.discard("thing", KEY) is False
    # The old one is whole until the new one takes its place.
    assert bench.open().read(reference).read_json("value.json")["b"] == 1
    answer(living)
    found = store.find("thing", KEY)
    assert found is not None
    assert store.read(found).read_json("value.json") == 1
    assert store.discard("thing", KEY) is True
    assert store.find("thing", KEY) is None
    assert store.discard("thing", KEY) is False


def test_a_reader_during_replacements_sees_a_whole_artefact_or_none(bench: Bench, store: Store) -> None:
    code = """
        store, key = Store.open(sys.argv[1]), sys.argv[2]
        print("started", flush=True)
        for number in range(int(sys.argv[3])):
            def make(draft):
                for part in "abc":
                    draft.write_json(part + ".json", [number] * 100)
            store.obtain("thing", key, make, replace=True)
    """
    writer = child(code, bench.location, KEY, str(bench.rounds))
    reader = bench.open()
    while writer.poll() is None:
        found = reader.find("thing", KEY)
        if found is None:
            continue
        try:
            artefact = reader.read(found)
            texts = {artefact.file(f"{part}.json").read_text() for part in "abc"}
        except (ArtefactDamagedError, FileNotFoundError):
            continue
        # Files read one by one may straddle a replacement; each on its own is never half-written.
        assert all(len(set(json.loads(text))) == 1 for text in texts)
    answer(writer)
    # How many of them a reader gets hold of whole meanwhile depends on who is quick; the last one it does.
    last = reader.find("thing", KEY)
    assert last is not None
    texts = {reader.read(last).file(f"{part}.json").read_text() for part in "abc"}
    assert [set(json.loads(text)) for text in texts] == [{bench.rounds - 1}]
    assert drafts(store) == []


def test_a_full_disk_is_one_sentence_and_nothing_half_written(bench: Bench, store: Store) -> None:
    code = """
        import resource
        from bmm.errors import OutputError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        def make(draft):
            draft.write_json("small.json", 1)
            (draft.path / "large.bin").write_bytes(bytes(100_000))
        try:
            Store.open(sys.argv[1]).obtain("thing", sys.argv[2], make)
        except OutputError as error:
            print(error)
    """
    said = answer(child(code, bench.location, KEY))
    assert said.startswith(f"{store.root} cannot be written: the disk is full")
    assert drafts(store) == []
    assert store.entries() == []
    assert store.obtain("thing", KEY, fill)[1] is False


def test_a_full_disk_that_safetensors_meets_is_the_same_sentence(bench: Bench, store: Store) -> None:
    code = """
        import resource, numpy
        from safetensors.numpy import save_file
        from bmm.errors import OutputError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        def make(draft):
            save_file({"a": numpy.zeros(100_000)}, draft.path / "a.safetensors")
        try:
            Store.open(sys.argv[1]).obtain("thing", sys.argv[2], make)
        except OutputError as error:
            print(error)
    """
    assert "the disk is full" in answer(child(code, bench.location, KEY))
    assert store.entries() == []


def test_a_users_mistake_while_making_is_not_blamed_on_the_store(store: Store) -> None:
    def make(draft: Draft) -> None:
        try:
            raise PermissionError(13, "Permission denied", "rows.jsonl")
        except PermissionError:
            raise DataError("rows.jsonl cannot be read") from None

    with pytest.raises(DataError, match=r"rows\.jsonl cannot be read"):
        store.obtain("thing", KEY, make)
