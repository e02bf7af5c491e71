from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from distributed import Client

from bmm.cluster import connection
from bmm.cluster.connection import workers
from bmm.cluster.run import run_all
from bmm.cluster.settings import ClusterSettings
from bmm.errors import ClusterError, DataError, RecipeError


class Counting:
    def __init__(self) -> None:
        self.steps = 0.0

    def advance(self, steps: float = 1.0) -> None:
        self.steps += steps

    def describe(self, text: str) -> None:
        raise AssertionError(text)


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with Client(processes=False, n_workers=2, threads_per_worker=1, dashboard_address=":0") as found:
        yield found


def test_answers_come_in_the_order_of_the_requests(client: Client) -> None:
    def square(request: dict[str, Any]) -> dict[str, Any]:
        import time

        time.sleep(0.02 * (5 - request["number"]))
        return {"square": request["number"] ** 2}

    bar = Counting()
    assert run_all(client, square, [{"number": number} for number in range(6)], bar) == [
        {"square": number**2} for number in range(6)
    ]
    assert bar.steps == 6


def test_equal_requests_are_each_answered(client: Client) -> None:
    assert run_all(client, lambda request: request, [{"a": 1}, {"a": 1}], Counting()) == [{"a": 1}, {"a": 1}]
    assert run_all(client, lambda request: request, [], Counting()) == []


def test_a_users_mistake_in_a_worker_comes_back_as_it_was(client: Client) -> None:
    def fail(request: dict[str, Any]) -> dict[str, Any]:
        raise DataError(f"row {request['number']} is wrong")

    with pytest.raises(DataError, match="row 3 is wrong"):
        run_all(client, fail, [{"number": 3}], Counting())


def test_a_scheduler_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_CONNECT_SECONDS", 0.3)
    address = "tcp://127.0.0.1:9"
    said = rf"'cluster\.scheduler': no Dask scheduler answers at {address}"
    with pytest.raises(RecipeError, match=said) as caught, workers(ClusterSettings(scheduler=address)):
        raise AssertionError("connected to nothing")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("address", ["nonsense://x", "tcp://"])
def test_an_address_that_is_none_is_named(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_CONNECT_SECONDS", 0.3)
    with pytest.raises(RecipeError, match=r"'cluster\.scheduler'"), workers(ClusterSettings(scheduler=address)):
        raise AssertionError("connected to nothing")


@pytest.mark.slow
def test_a_worker_that_dies_has_its_work_done_elsewhere_and_a_deadly_request_is_given_up(tmp_path: Any) -> None:
    def die_once(request: dict[str, Any]) -> dict[str, Any]:
        import os
        from pathlib import Path

        mark = Path(request["folder"]) / "died"
        if request["number"] == 1 and not mark.exists():
            mark.write_text("")
            os._exit(1)
        return {"number": request["number"]}

    def die(request: dict[str, Any]) -> dict[str, Any]:
        import os

        os._exit(1)

    requests = [{"number": number, "folder": str(tmp_path)} for number in range(4)]
    with workers(ClusterSettings(workers=1, memory_limit="1 GiB")) as client:
        assert run_all(client, die_once, requests, Counting()) == [{"number": number} for number in range(4)]
        assert (tmp_path / "died").exists()
        with pytest.raises(ClusterError, match="killed every worker that tried it"):
            run_all(client, die, requests[:1], Counting())
