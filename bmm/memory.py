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


def give_back() -> None:
    """Have the C library give all free memory back to the system; where it cannot be told to, nothing happens."""
    _trim()(0)


@cache
def _trim() -> Callable[[int], object]:
    """Return glibc's `malloc_trim`, or what does nothing where there is another C library (musl, macOS)."""
    if sys.platform != "linux":
        return lambda _: None
    found: Callable[[int], object] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return (lambda _: None) if found is None else found
