"""Stopping the evaluation of a model that cannot win any more: a bound on its final score from the rows seen so far.

The rows of every task are read in a fixed order, the same for all models, part by part. After each part but the last
the model is compared with its rival in pairs on the rows seen: with `d` the differences of their gains, the final
difference is `D = 1/T Σ_t mean(d_t)` over all rows, of which those not seen are as good as drawn from the same task.
`D` is estimated from the rows seen, with the variance of a mean of `k` out of `n` rows drawn without replacement,
`s²/k (1 − k/n)` (Cochran, Sampling Techniques, 2.6); a model whose estimate lies three standard errors below zero is
stopped. (A bound that supposes every row to come as right would stop nobody before the last rows.)

What a stopped model is worth is the rival's whole score plus the estimated difference: the rival's rows are known, so
that this is nearer to the truth than the mean of the rows seen alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bmm.digest import digest_text

PARTS = 4
"""Pieces of a task's rows; after each but the last a model may be stopped."""
LEAST_ROWS = 16
"""In one part; tasks with fewer rows are read whole."""
_STANDARD_ERRORS = 3.0

Rows = NDArray[np.float64]


@dataclass(frozen=True)
class Stopped:
    """Why a model was stopped: what it was heading for, and the variance of that estimate."""

    objective: float
    variance: float


def parts(task: str, rows: int) -> list[list[int]]:
    """Return the row indices of each part: a random order that depends on the task's name and size alone."""
    order = np.random.default_rng([rows, int(digest_text(task)[:16], 16)]).permutation(rows)
    count = min(PARTS, max(1, rows // LEAST_ROWS))
    pieces = [piece.tolist() for piece in np.array_split(order, count)]
    return [*([] for _ in range(PARTS - count)), *pieces]


def verdict(seen: Mapping[str, Sequence[int]], found: Mapping[str, Rows], rival: Mapping[str, Rows]) -> Stopped | None:
    """Return what a model that has lost was heading for, or None where it may still win.

    Args:
        seen: by task, the indices of the rows seen.
        found: by task, the gains of those rows in that order.
        rival: by task, the rival's gains of all rows.
    """
    if set(found) != set(rival) or any(len(rows) < 2 for rows in found.values()):
        return None
    count = len(found)
    difference = variance = 0.0
    for task, rows in found.items():
        apart = rows - rival[task][list(seen[task])]
        difference += float(apart.mean()) / count
        unseen = 1 - len(rows) / len(rival[task])
        variance += float(apart.var(ddof=1)) / len(rows) * unseen / count**2
    if difference + _STANDARD_ERRORS * float(np.sqrt(variance)) >= 0:
        return None
    whole = float(np.mean([rows.mean() for rows in rival.values()]))
    return Stopped(whole + difference, variance)
