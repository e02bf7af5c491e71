"""Sizes as people write them, in bytes."""

from __future__ import annotations

from dask.utils import parse_bytes as _parse


def parse_bytes(text: str) -> int:
    """Return a size such as `2GiB` or `500 MB` in bytes."""
    size: int = _parse(text)
    return size


def readable_bytes(count: float) -> str:
    """Return a number of bytes in the unit that people read it in."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
