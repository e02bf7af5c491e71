"""What a walk keeps of the experts' answers, by sizes alone. No torch here, so that a plan may ask."""

from __future__ import annotations

_PART = 4
_WIDE = 4


def room_for_answers(limit: int) -> int:
    """Return the bytes of experts' answers that a walk keeps within a memory limit in bytes.

    A batch whose answers are not kept is run through its expert again for each group of the layer: as many bytes fewer,
    for a few passes more.
    """
    return limit // _PART


def without_answers(inputs: int, outputs: int) -> bool:
    """Say whether maps of one input behind the layers have so many outputs that their sums are made without answers."""
    return outputs >= _WIDE * inputs
