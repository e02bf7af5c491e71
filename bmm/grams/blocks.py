"""How many shards are added together while others are computed, and so how many are on disk at once. Pure numbers."""

from __future__ import annotations

from collections.abc import Sequence

BLOCK = 64
"""So many shards are added to a running sum at a time, which is then written anew."""
BEHIND = 1
"""So many whole blocks may wait to be added before those who compute are kept waiting."""


def most_held(shards: Sequence[int], in_flight: int) -> int:
    """Return how many shards and running sums lie in the store at once, at most, if no shard is late.

    Args:
        shards: of each expert; experts come one after the other, and what is left of each waits for the last.
        in_flight: how many shards are asked for at once.
    """
    left = [count if count <= BLOCK else (count - 1) % BLOCK + 2 for count in shards]
    # Besides the blocks one sum that is read and the next that is written.
    peaks = [min(count + 1, (BEHIND + 1) * BLOCK + in_flight + 2) if count > BLOCK else count for count in shards]
    return sum(left) + max((peak - kept for peak, kept in zip(peaks, left, strict=True)), default=0)
