"""The measurement of overhead, at a small count: that it measures, not how much."""

from __future__ import annotations

import pytest
from benchmarks.overhead import store_overhead


@pytest.mark.slow
def test_sleeps_are_counted_and_what_comes_on_top() -> None:
    found = store_overhead(shards=24, seconds=0.05, workers=2)
    assert found["seconds"] >= 24 * 0.05 / 2
    assert found["ratio"] == pytest.approx(found["seconds"] / (24 * 0.05 / 2) - 1)
    assert (found["shards"], found["workers"], found["sleep"]) == (24, 2, 0.05)
