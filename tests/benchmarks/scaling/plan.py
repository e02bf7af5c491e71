"""What `bmm plan` says of memory, over what the same merge then takes: models of three sizes, both modes.

Llamas of a few layers, made locally, by the whole command. Of each stage the process that has most counts: a worker of
the Gram stage, else the merge's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.llama import Shape
from benchmarks.scaling.streaming import Streamed, prepare, run

MODES = ("propagated", "module-wise")
ROWS, TOKENS = 8, 128
_MEMORY = "4GiB"


def measure(folder: Path, *, quick: bool) -> dict[str, Any]:
    """Return the plan's peak over the measured one, by size and mode, and both of each stage."""
    ratios: dict[str, float] = {}
    stages: dict[str, Any] = {}
    for width, layers in ((256, 2),) if quick else ((512, 12), (1024, 8), (2048, 4)):
        place = folder / str(width)
        prepare(place, shape(width, layers), ROWS, TOKENS)
        for mode in MODES:
            found = run(place, mode, ROWS, TOKENS, _MEMORY)
            compared = by_stage(found)
            name = f"{width} wide, {mode}"
            stages[name] = compared
            ratios[name] = max(one["planned"] for one in compared.values()) / max(
                one["measured"] for one in compared.values()
            )
    return {"planned_peak_vs_measured": ratios, "stages": stages, "rows": ROWS, "tokens": TOKENS}


def shape(width: int, layers: int) -> Shape:
    """Return a Llama's sizes at a width, in TinyLlama's proportions."""
    return Shape(
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(width // 512, 1),
        vocab_size=width * 15,
    )


def by_stage(found: Streamed) -> dict[str, Mapping[str, int]]:
    """Return planned and measured bytes of the largest process of each stage."""
    return {
        stage: {"planned": planned["worker_bytes"] or planned["memory_bytes"], "measured": found.stage_peaks[stage]}
        for stage, planned in found.planned.items()
        if stage in found.stage_peaks
    }
