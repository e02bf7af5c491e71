"""The trust region: the box around the best trial in which the next one is looked for.

After TuRBO (Eriksson et al., NeurIPS 2019). The box doubles after two improvements in a row and halves after four
proposals in a row without one; once it is very small it starts over at its first length. A box that would stick out of
the cube is moved inside, so the anchor at the end of every λ axis still has a full neighbourhood. Unlike TuRBO the box
is the same length along each axis: with some twenty trials the length scales are too uncertain to shape it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bmm.errors import BMMError
from bmm.search.space import Point
from bmm.search.trial import Trial, best_of

FIRST_LENGTH = 0.8
LARGEST_LENGTH = 0.8
SMALLEST_LENGTH = 0.05
SUCCESSES_TO_GROW = 2
FAILURES_TO_SHRINK = 4


@dataclass(frozen=True)
class TrustRegion:
    """A box of the unit cube: its lower corner, and one edge length for all axes."""

    lower: Point
    length: float

    @property
    def upper(self) -> Point:
        """The corner opposite `lower`."""
        return tuple(min(value + self.length, 1.0) for value in self.lower)

    def at(self, place: Sequence[float]) -> Point:
        """Return the cube's point at `place`, given as shares of the box's edges."""
        return as_point([low + share * self.length for low, share in zip(self.lower, place, strict=True)])


def as_point(values: Sequence[float]) -> Point:
    """Return a point of the cube to 12 decimals."""
    return tuple(round(min(max(float(value), 0.0), 1.0), 12) for value in values)


def trust_region(history: Sequence[Trial], kept: Sequence[Trial] | None = None) -> TrustRegion:
    """Return the box around the best complete trial, its length replayed from the history.

    Args:
        history: the trials so far, by index.
        kept: those of them that the box may lie around (all).

    Raises:
        BMMError: no trial is complete.
    """
    best = best_of(kept or ()) or best_of(history)
    if best is None:
        raise BMMError("no trial of the search is complete, so there is no best setting to search around")
    length = FIRST_LENGTH
    highest = float("-inf")
    successes = failures = 0
    for trial in history:
        # A trial that was stopped had lost its race.
        objective = float("-inf") if trial.objective is None or trial.state != "complete" else trial.objective
        improved = objective > highest
        highest = max(highest, objective)
        if trial.origin != "bayesian":
            continue
        successes, failures = (successes + 1, 0) if improved else (0, failures + 1)
        if successes == SUCCESSES_TO_GROW:
            length, successes = min(2 * length, LARGEST_LENGTH), 0
        elif failures == FAILURES_TO_SHRINK:
            length, failures = length / 2, 0
            if length < SMALLEST_LENGTH:
                length = FIRST_LENGTH
    lower = tuple(min(max(value - length / 2, 0.0), 1.0 - length) for value in best.point)
    return TrustRegion(lower, length)
