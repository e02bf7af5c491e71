from __future__ import annotations

from typing import Any

import pytest

from bmm.cluster import connection
from bmm.cluster.connection import workers
from bmm.cluster.settings import ClusterSettings
from bmm.errors import ClusterError, RecipeError
from bmm.progress import SilentReporter, reporting


class Listening(SilentReporter):
    def __init__(self) -> None:
        self.told: list[str] = []

    def tell(self, text: str) -> None:
        self.told.append(text)


def test_a_scheduler_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_CONNECT_SECONDS", 0.3)
    address = "tcp://127.0.0.1:9"
    said = rf"'cluster\.scheduler': no Dask scheduler answers at {address}"
    with pytest.raises(RecipeError, match=said) as caught, workers(ClusterSettings(scheduler=address)):
        raise AssertionError("connected to nothing")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "address", ["nonsense://x", "tcp://", "tls://127.0.0.1:8786", "tcp://127.0.0.1:abc", "ucx://127.0.0.1:1"]
)
def test_an_address_that_is_none_is_named(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_CONNECT_SECONDS", 0.3)
    with pytest.raises(RecipeError, match=r"'cluster\.scheduler'"), workers(ClusterSettings(scheduler=address)):
        raise AssertionError("connected to nothing")


def test_a_scheduler_without_workers_is_waited_for_and_named() -> None:
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=0, processes=False, protocol="tcp", host="127.0.0.1", dashboard_address="127.0.0.1:0"
    ) as empty:
        address = str(empty.scheduler_address)
        settings = ClusterSettings(scheduler=address, retry_seconds=0.5)
        with (
            workers(settings) as cluster,
            pytest.raises(ClusterError, match=rf"{address} has had no workers for 0 s; start"),
        ):
            cluster.count()


def test_workers_that_are_still_to_come_are_counted() -> None:
    from distributed import Client, LocalCluster

    with LocalCluster(
        n_workers=1, processes=False, protocol="tcp", host="127.0.0.1", dashboard_address="127.0.0.1:0"
    ) as queue:
        jobs = connection.Cluster(lambda: Client(queue), "of jobs", 5.0, expected=3)
        try:
            # As the first of three jobs has left the queue.
            assert len(jobs.addresses()) == 1
            assert jobs.count() == 3
        finally:
            jobs.close()


def test_the_dashboard_is_shown_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from distributed import LocalCluster

    heard = Listening()
    with (
        LocalCluster(
            n_workers=1, processes=False, protocol="tcp", host="127.0.0.1", dashboard_address="127.0.0.1:0"
        ) as local,
        reporting(heard),
    ):
        settings = ClusterSettings(scheduler=str(local.scheduler_address))
        monkeypatch.setattr(connection, "_has_dashboard", lambda _: True)
        with workers(settings) as cluster:
            assert cluster.count() == 1
            assert heard.told == [f"Dask's dashboard: {local.dashboard_link}"]
            assert local.dashboard_link.startswith("http://127.0.0.1:")


def test_a_client_that_was_closed_is_a_scheduler_that_is_away() -> None:
    class Closed:
        def scheduler_info(self, **_: Any) -> dict[str, Any]:
            return {"type": "Scheduler"}

    cluster: Any = connection.Cluster(Closed, "of jobs", 5.0)  # type: ignore[arg-type]
    with pytest.raises(OSError, match="the Dask scheduler of jobs has gone away"):
        cluster.addresses()
