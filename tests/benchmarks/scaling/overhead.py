"""What scheduler and store cost beside 10,000 shards, which are sleeps here."""

from __future__ import annotations

from typing import Any


def measure(*, quick: bool) -> dict[str, Any]:
    """Return the time beyond the sleeps over the sleeps' own."""
    from benchmarks.overhead import store_overhead

    found = store_overhead(shards=200) if quick else store_overhead()
    return {"store_overhead_10k_shards": found["ratio"], **found}
