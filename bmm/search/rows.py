"""What the rows behind trials tell of the noise between them. Pure; how rows come to be is `bmm.evaluation.objectives`.

Every trial answers the same rows, so which rows were drawn moves all of them alike and does not tell them apart. What
does is how the model of a setting happens to do better on some rows and worse on others than the other models: so the
noise of a trial is that of its rows around the mean of all trials' rows, a randomised block design whose blocks are
rows (Box, Hunter and Hunter, Statistics for Experimenters, chapter 4; in simulation, common random numbers). Between
settings near each other that is a fraction of the variance over draws of the rows. It is an upper bound: what a setting
systematically does to some rows and not to others is in it (`bmm.search.bayesian` finds how much of it is noise).
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

GainsByTask = Mapping[str, NDArray[np.float64]]
"""By task, what each row adds to the task's part of the objective, (rows,), in an order that is always the same.

NaN stands for a row that was not seen.
"""

_FORMAT = "<f8"


def variances(gains: Sequence[GainsByTask]) -> list[float] | None:
    """Return the variance of each trial's objective that it does not share with the others.

    Args:
        gains: of each trial; those that were stopped have NaN in rows not seen.

    Returns:
        `Σ_t var_r(g_tr − ḡ_tr) / rows_t / tasks²` with the mean `ḡ` over the trials that have seen all rows, which
        for those themselves is scaled up by what that mean has of them; None where fewer than two have.
    """
    whole = [one for one in gains if is_whole(one)]
    if len(whole) < 2:
        return None
    mean = {task: np.mean([one[task] for one in whole], axis=0) for task in whole[0]}
    own_share = len(whole) / (len(whole) - 1)
    return [_mean_variance(one, mean) * (own_share if is_whole(one) else 1.0) for one in gains]


def variance_of_difference(one: GainsByTask, other: GainsByTask) -> float:
    """Return the variance of the difference of two trials' objectives over draws of the rows, paired row by row."""
    return _mean_variance(one, other)


def is_whole(gains: GainsByTask) -> bool:
    """Say whether every row was seen."""
    return not any(bool(np.isnan(rows).any()) for rows in gains.values())


def encoded(gains: GainsByTask) -> dict[str, str]:
    """Return gains as text, to the last bit."""
    return {task: b64encode(rows.astype(_FORMAT).tobytes()).decode("ascii") for task, rows in sorted(gains.items())}


def decoded(texts: Mapping[str, str]) -> GainsByTask:
    """Return what `encoded` was given.

    Raises:
        ValueError: a text is not of its making.
    """
    return {
        task: np.frombuffer(b64decode(text, validate=True), _FORMAT).astype(np.float64) for task, text in texts.items()
    }


def _mean_variance(one: GainsByTask, other: GainsByTask) -> float:
    """Return the variance of the mean over tasks of the mean over the rows that both have seen."""
    found = 0.0
    for task, rows in one.items():
        apart = rows - other[task]
        seen = apart[~np.isnan(apart)]
        found += float(seen.var(ddof=1)) / len(seen) if len(seen) > 1 else 0.0
    return found / len(one) ** 2
