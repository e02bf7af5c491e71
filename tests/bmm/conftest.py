"""Stores of every kind, for the tests that hold for all of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from object_server import FaultyProxy, ObjectServer
from store_benches import Bench, LocalBench, ObjectBench

from bmm.store import Store


@pytest.fixture(params=["folder", "objects"])
def bench(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """An empty store of each kind."""
    if request.param == "folder":
        return LocalBench(tmp_path / "store")
    server: ObjectServer = request.getfixturevalue("object_server")
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    return ObjectBench(server)


@pytest.fixture
def store(bench: Bench) -> Store:
    """The bench's store, open."""
    return bench.open()


@pytest.fixture
def proxy(object_server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """A faulty proxy in front of the object server, at which this process's environment points."""
    made = FaultyProxy(object_server.port)
    for name, value in object_server.environment(made.port).items():
        monkeypatch.setenv(name, value)
    yield made
    made.close()


@pytest.fixture
def objects(object_server: ObjectServer, proxy: FaultyProxy) -> ObjectBench:
    """An empty store in a bucket, reached through the proxy."""
    return ObjectBench(object_server)
