"""How much of a worker's memory a walk gives to the experts' answers. No torch here, so that a plan may ask."""

from __future__ import annotations

_PART = 4


def room_for_answers(limit: int) -> int:
    """Return the bytes of experts' answers that a walk keeps within a memory limit in bytes.

    A batch whose answers are not kept is run through its expert again for each group of the layer: as many bytes fewer,
    for a few passes more.
    """
    return limit // _PART
