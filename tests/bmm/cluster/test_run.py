from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from distributed import Client

from bmm.cluster.connection import Cluster, workers
from bmm.cluster.run import run_all
from bmm.cluster.settings import ClusterSettings
from bmm.errors import DataError, KilledWorkersError, StoreAwayError
from bmm.progress import SilentReporter, reporting


class Counting:
    def __init__(self) -> None:
        self.steps = 0.0

    def advance(self, steps: float = 1.0) -> None:
        self.steps += steps

    def describe(self, text: str) -> None:
        raise AssertionError(text)


class Listening(SilentReporter):
    def __init__(self) -> None:
        self.told: list[str] = []

    def tell(self, text: str) -> None:
        self.told.append(text)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Client(processes=False, n_workers=2, threads_per_worker=1, dashboard_address=":0") as found:
        yield Cluster(lambda: found, "of the tests", 2.0)


def test_answers_come_in_the_order_of_the_requests(cluster: Cluster) -> None:
    def square(request: dict[str, Any]) -> dict[str, Any]:
        import time

        time.sleep(0.02 * (5 - request["number"] % 6))
        return {"square": request["number"] ** 2}

    bar = Counting()
    requests = [{"number": number} for number in range(30)]
    assert run_all(cluster, square, requests, bar) == [{"square": number**2} for number in range(30)]
    assert bar.steps == 30
    assert run_all(cluster, square, requests[:3], bar, steps=lambda request: request["number"]) == [
        {"square": number**2} for number in range(3)
    ]
    assert bar.steps == 33


def test_no_more_is_asked_at_once_than_the_workers_have_use_for(cluster: Cluster) -> None:
    def noted(request: dict[str, Any]) -> int:
        import time

        time.sleep(0.005)
        return int(request["number"])

    most, submit = [0], cluster.client.map

    def counting(function: Any, requests: Any, **options: Any) -> Any:
        most[0] = max(most[0], len(requests), len(cluster.client.futures))
        return submit(function, requests, **options)

    cluster.client.map = counting
    try:
        assert run_all(cluster, noted, [{"number": number} for number in range(100)]) == list(range(100))
    finally:
        cluster.client.map = submit
    assert 2 <= most[0] <= 3 * 2 + 2


def test_equal_requests_are_each_answered(cluster: Cluster) -> None:
    assert run_all(cluster, lambda request: request, [{"a": 1}, {"a": 1}], Counting()) == [{"a": 1}, {"a": 1}]
    assert run_all(cluster, lambda request: request, [], Counting()) == []


def test_a_users_mistake_in_a_worker_comes_back_as_it_was(cluster: Cluster) -> None:
    def fail(request: dict[str, Any]) -> dict[str, Any]:
        raise DataError(f"row {request['number']} is wrong")

    with pytest.raises(DataError, match="row 3 is wrong"):
        run_all(cluster, fail, [{"number": 3}], Counting())


def test_answers_are_told_as_they_land(cluster: Cluster) -> None:
    told: dict[int, int] = {}
    requests = [{"number": number} for number in range(30)]
    answers = run_all(cluster, lambda request: request["number"] ** 2, requests, landed=told.__setitem__)
    assert [told[place] for place in range(30)] == answers


def test_what_goes_wrong_where_answers_are_told_ends_the_run_and_is_not_tried_again(cluster: Cluster) -> None:
    told: list[int] = []

    def refuse(place: int, _: int) -> None:
        told.append(place)
        # As the connection's own trouble would look.
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        run_all(cluster, lambda request: request["number"], [{"number": one} for one in range(9)], landed=refuse)
    assert len(told) == 1


def test_a_fault_of_the_machine_is_tried_again_and_not_for_ever(cluster: Cluster, tmp_path: Path) -> None:
    def flaky(request: dict[str, Any]) -> int:
        marks = Path(request["marks"])
        with marks.open("a") as file:
            file.write("x")
        if len(marks.read_text()) < request["good"]:
            raise OSError("stale file handle")
        return len(marks.read_text())

    assert run_all(cluster, flaky, [{"marks": str(tmp_path / "a"), "good": 3}]) == [3]
    with pytest.raises(OSError, match="stale file handle"):
        run_all(cluster, flaky, [{"marks": str(tmp_path / "b"), "good": 4}])
    assert (tmp_path / "b").read_text() == "xxx"


def test_a_store_that_is_away_is_waited_for_and_not_for_ever(cluster: Cluster, tmp_path: Path) -> None:
    def look(request: dict[str, Any]) -> int:
        tries = Path(request["tries"])
        with tries.open("a") as file:
            file.write("x")
        if len(tries.read_text()) < request["good"]:
            raise StoreAwayError("the store is away.")
        return int(request["number"])

    heard = Listening()
    requests = [{"tries": str(tmp_path / "a"), "good": 9, "number": number} for number in range(8)]
    with reporting(heard):
        assert run_all(cluster, look, requests) == list(range(8))
    assert set(heard.told) == {"the store is away. Trying again for 2 s."}
    hopeless = [{"tries": str(tmp_path / "b"), "good": 10**6, "number": number} for number in range(8)]
    with pytest.raises(StoreAwayError, match="the store is away"):
        run_all(cluster, look, hopeless)


@pytest.mark.slow
def test_a_worker_that_dies_has_its_work_done_elsewhere_and_a_deadly_request_is_given_up(tmp_path: Path) -> None:
    def die_once(request: dict[str, Any]) -> dict[str, Any]:
        import os

        mark = Path(request["folder"]) / "died"
        if request["number"] == 1 and not mark.exists():
            mark.write_text("")
            os._exit(1)
        return {"number": request["number"]}

    def die(request: dict[str, Any]) -> dict[str, Any]:
        import os

        os._exit(1)

    heard = Listening()
    requests = [{"number": number, "folder": str(tmp_path)} for number in range(4)]
    with reporting(heard), workers(ClusterSettings(workers=1, memory_limit="1 GiB")) as cluster:
        assert run_all(cluster, die_once, requests, Counting()) == [{"number": number} for number in range(4)]
        assert (tmp_path / "died").exists()
        with pytest.raises(KilledWorkersError, match="killed every worker that tried it"):
            run_all(cluster, die, requests[:1], Counting())
    assert any(line.startswith("Workers lost: ") for line in heard.told)


@pytest.mark.slow
def test_an_answer_that_goes_with_its_worker_and_fails_again_is_asked_again(tmp_path: Path) -> None:
    """Dask computes what was lost again by itself; that the store is away just then is no end of the run."""

    def look(request: dict[str, Any]) -> int:
        import os

        tries = Path(request["tries"])
        with tries.open("a") as file:
            file.write(f"{os.getpid()}\n")
        if len(tries.read_text().splitlines()) == 2:
            raise StoreAwayError("the store is away.")
        return 7

    tries = tmp_path / "tries"
    with workers(ClusterSettings(workers=1, memory_limit="1 GiB")) as cluster:
        gather = cluster.client.gather

        def late(futures: Sequence[Any]) -> Any:
            cluster.client.gather = gather
            os.kill(int(tries.read_text()), signal.SIGKILL)
            end = time.monotonic() + 60
            while futures[0].status != "error" and time.monotonic() < end:
                time.sleep(0.05)
            return gather(futures)

        cluster.client.gather = late
        assert run_all(cluster, look, [{"tries": str(tries)}]) == [7]
    assert len(tries.read_text().splitlines()) == 3
