"""Stores of every kind, for the tests that hold for all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from store_benches import Bench, LocalBench

from bmm.store import Store


@pytest.fixture(params=["local"])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Bench:
    """An empty store of each kind."""
    return LocalBench(tmp_path / "store")


@pytest.fixture
def store(bench: Bench) -> Store:
    """The bench's store, open."""
    return bench.open()
