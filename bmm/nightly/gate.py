"""The gate: whether a new model becomes the champion, by what both answer on the same test rows.

Pure: scores in, a verdict out. Running the models is `bmm.nightly.answers`; what the verdict moves is the registry's
business.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bmm.evaluation.metrics import Bootstrap, Measured
from bmm.nightly.settings import Gate
from bmm.recipe import EvaluationSettings


@dataclass(frozen=True)
class Row:
    """One task, or the mean of those that both models have: scores, and their difference with its interval."""

    task: str
    rows: int
    new: float
    champion: float | None = None
    low: float | None = None
    high: float | None = None
    floor: float | None = None
    note: str = ""

    @property
    def difference(self) -> float | None:
        """The new model's score less the champion's."""
        return None if self.champion is None else self.new - self.champion

    def to_json(self) -> dict[str, Any]:
        """Return the row as plain JSON values."""
        return {**vars(self), "difference": self.difference}


@dataclass(frozen=True)
class Verdict:
    """What the gate says; `reasons` are those against the new model, a sentence each."""

    reasons: tuple[str, ...]
    rows: tuple[Row, ...]
    certainty: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the new model may become the champion."""
        return not self.reasons

    def to_json(self) -> dict[str, Any]:
        """Return the verdict as plain JSON values."""
        return {
            "passed": self.passed,
            "reasons": list(self.reasons),
            "rows": [row.to_json() for row in self.rows],
            "certainty": self.certainty,
        }


@dataclass(frozen=True)
class Champion:
    """The champion's answers on the same rows, and why it has none for other tasks of the new model.

    `lost` are its tasks that the new model lacks because their experts were broken, each with what is wrong.
    """

    name: str
    answers: Mapping[str, Measured]
    incomparable: Mapping[str, str] = field(default_factory=dict)
    lost: Mapping[str, str] = field(default_factory=dict)


def judge(
    new: Mapping[str, Measured], champion: Champion | None, gate: Gate, evaluation: EvaluationSettings
) -> Verdict:
    """Compare a new model with the champion, if there is one, and with the floors.

    Args:
        new: the new model's answers on the test rows of all of its tasks.
        champion: the champion's on the same rows.
        gate: what is asked for.
        evaluation: how often rows are drawn again, by which seed, and the confidence of the intervals.

    Raises:
        BMMError: the two were not run over the same rows.
    """
    reasons: list[str] = []
    table: list[Row] = []
    certainty = None
    known = {} if champion is None else {task: one for task, one in champion.answers.items() if task in new}
    bootstrap = None
    if known:
        bootstrap = Bootstrap(
            {task: {"new": new[task], "champion": known[task]} for task in known},
            samples=evaluation.bootstrap_samples,
            seed=evaluation.bootstrap_seed,
            confidence=evaluation.confidence,
        )
    for task, measured in new.items():
        floor = gate.tasks.get(task)
        if floor is not None and measured.score < floor:
            reasons.append(f"{task} has {_points(measured.score)}, below its floor of {_points(floor)}")
        if bootstrap is None or task not in known:
            note = "" if champion is None else champion.incomparable.get(task, "new")
            table.append(Row(task, len(measured), measured.score, floor=floor, note=note))
            continue
        before = known[task].score
        interval = bootstrap.difference("new", "champion", task)
        table.append(Row(task, len(measured), measured.score, before, interval.low, interval.high, floor))
        if before - measured.score > gate.loss:
            reasons.append(
                f"{task} has {_points(measured.score)}, {_points(before - measured.score)} below the champion's "
                f"{_points(before)} (at most {_points(gate.loss)} are allowed)"
            )
    overall = _mean(new)
    if overall < gate.mean:
        reasons.append(f"the mean over all tasks is {_points(overall)}, below its floor of {_points(gate.mean)}")
    if bootstrap is None:
        table.append(Row("mean", sum(map(len, new.values())), overall, floor=gate.mean or None))
    else:
        ours, theirs = _mean({task: new[task] for task in known}), _mean(known)
        interval = bootstrap.difference("new", "champion")
        certainty = bootstrap.certainty("new", "champion", gate.gain)
        note = "" if len(known) == len(new) else f"of the {len(known)} tasks that both have"
        rows = sum(map(len, known.values()))
        table.append(Row("mean", rows, ours, theirs, interval.low, interval.high, gate.mean or None, note))
        wanted = f"a gain of {_points(gate.gain)}" if gate.gain else "a gain"
        if ours - theirs < gate.gain:
            reasons.append(
                f"the mean is {_points(ours)}, the champion's {_points(theirs)}: {_signed(ours - theirs)} points, and "
                f"at least {_signed(gate.gain)} are asked for"
            )
        elif certainty < gate.certainty:
            reasons.append(
                f"{wanted} is seen in {certainty:.0%} of the resamples, and {gate.certainty:.0%} are asked for"
            )
    for task, why in ({} if champion is None else champion.lost).items():
        reasons.append(f"it lacks {task}, which the champion has, since its expert is broken ({why})")
    return Verdict(tuple(reasons), tuple(table), certainty)


def _mean(measured: Mapping[str, Measured]) -> float:
    return float(np.mean([one.score for one in measured.values()]))


def _points(score: float) -> str:
    return f"{100 * score:.1f}"


def _signed(score: float) -> str:
    return f"{100 * score:+.1f}"
