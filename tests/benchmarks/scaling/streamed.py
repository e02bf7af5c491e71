"""The peak memory of a whole merge of 3 experts of 1.1 billion parameters, of the process that has most."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def measure(folder: Path, *, quick: bool) -> dict[str, Any]:
    """Return the peak of a module-wise and of a propagated merge, and what each stage took."""
    from benchmarks.llama import Shape
    from benchmarks.streaming import prepare, run

    rows, tokens = (16, 16) if quick else (128, 64)
    prepare(folder, Shape(num_hidden_layers=2) if quick else Shape(), rows, tokens)
    found = {mode: run(folder, mode, tokens, "3GiB") for mode in ("module-wise", "propagated")}
    return {
        "streamed_peak_rss_bytes": max(one.peak for one in found.values()),
        "modes": {mode: {"peaks": one.peaks, "stages": one.stages} for mode, one in found.items()},
    }
