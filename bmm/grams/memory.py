"""How much memory a worker needs for the Gram matrices of one shard, and so whether its expert is streamed.

Both ways give the same bytes; the whole expert in memory is the faster one where it fits. Pure functions of sizes.
"""

from __future__ import annotations

from collections.abc import Sequence

PROCESS_BYTES = 640 * 2**20
"""What Python, torch and transformers take, their files in memory included, before a weight is loaded (measured)."""
_FLOAT32, _FLOAT64 = 4, 8


def whole_bytes(weights: int, sizes: Sequence[int]) -> int:
    """Return what a worker needs that has the whole expert, and all of its sums, in memory.

    Args:
        weights: number of the encoder's parameters.
        sizes: features of each distinct input.
    """
    return PROCESS_BYTES + _FLOAT32 * weights + _sums(sizes)


def streamed_bytes(outside: int, layer: int, sizes: Sequence[int], hidden: int) -> int:
    """Return what a worker needs that has one layer at a time in memory.

    Args:
        outside: number of the parameters that stand outside of the layers.
        layer: number of the largest layer's parameters.
        sizes: features of each distinct input of that layer.
        hidden: numbers in the hidden states of all rows of a shard.
    """
    # A layer answers while what it was given is still there.
    return PROCESS_BYTES + _FLOAT32 * (outside + layer + 2 * hidden) + _sums(sizes)


def _sums(sizes: Sequence[int]) -> int:
    """Return the bytes of float64 sums, with the float32 product that is added to one of them."""
    largest = max(sizes, default=0)
    return _FLOAT64 * sum(size**2 for size in sizes) + (_FLOAT32 + _FLOAT64) * largest**2
