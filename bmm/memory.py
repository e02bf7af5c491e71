"""Memory that was freed and is still the process's: given back to the system between the steps of a long stage.

The C library keeps what is freed below a size that grows with what is asked for (up to 32 MiB), and what lies between
pieces still in use stays in memory for good. A stage whose steps need tensors of different sizes would hold more and
more of it. What a stage needs at all is `bmm.estimate`.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache

MANY = 32 * 2**20
"""Bytes that are worth the way: looking through all free pieces takes a process with many of them milliseconds."""


WORKER_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(32 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(256 * 2**20)}
"""What a worker's process is started with, for glibc: pieces below 32 MiB are taken from what was freed before.

Dask's own setting (a trim threshold of 64 KiB, which also fixes the other one at 128 KiB) has the kernel clear new
pages for every tensor of every layer: a Gram shard of a 6-layer, 384-wide encoder took 2.5 s instead of 1.5, a third of
them in the kernel. What a worker keeps in return is at most the trim threshold.
"""


class _Freed:
    """What was freed since memory was last given back; about right is enough, whatever the thread."""

    size = 0


def give_back(freed: int) -> None:
    """Note that so many bytes were freed; once they are many, have the C library give all free memory to the system.

    Where it cannot be told to, nothing happens.
    """
    _Freed.size += freed
    if _Freed.size >= MANY:
        _Freed.size = 0
        _trim()(0)


@cache
def _trim() -> Callable[[int], object]:
    """Return glibc's `malloc_trim`, or what does nothing where there is another C library (musl, macOS)."""
    if sys.platform != "linux":
        return lambda _: None
    found: Callable[[int], object] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return (lambda _: None) if found is None else found
