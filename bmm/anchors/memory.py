"""How much memory merging the largest tensor takes, by the method: pure functions of sizes, for `bmm plan`.

What a method holds in float64 was measured on a Llama's output head, but for RegMean and Fisher, which are taken to
need what methods like them do; what it computes is in the methods' own files.
"""

from __future__ import annotations

from collections.abc import Mapping

_FLOAT32, _FLOAT64 = 4, 8
_COPIES: Mapping[str, float] = {
    # Entry by entry, a piece at a time.
    "average": 0.0,
    "ta": 0.0,
    "checkpoint": 0.0,
    # A threshold over all entries.
    "ties": 3.5,
    "dare": 7.0,
    # Factors of each expert's task vector beside it.
    "tsv": 5.8,
    "iso-c": 5.2,
    "iso-cts": 8.5,
    # Products of the inputs' size as well.
    "wudi": 6.3,
    "ace": 7.2,
    # Not measured: as ACE, and a sum and a weight of each entry.
    "regmean": 7.2,
    "fisher": 4.0,
}


def anchor_bytes(method: str, widest: int, stored_bytes: float, experts: int) -> int:
    """Return what merging a tensor takes beside the process: files that are read, the method's own, the result.

    Args:
        method: the anchor's name.
        widest: number of the largest tensor's entries.
        stored_bytes: of one entry in the checkpoints.
        experts: number of experts; the base is read as well.
    """
    return round(widest * ((experts + 1) * stored_bytes + _FLOAT32 + _COPIES[method] * _FLOAT64))
