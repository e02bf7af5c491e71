"""What a trial is: one evaluated setting of every module group, as the study keeps it (`bmm.search.study`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from bmm.search.rows import GainsByTask
from bmm.search.setting import Setting
from bmm.search.space import Point

Origin = Literal["anchor", "global", "sobol", "bayesian", "random", "cma-es"]
State = Literal["complete", "stopped", "failed"]


@dataclass(frozen=True)
class Trial:
    """One evaluated setting of every module group.

    Groups and tasks are put in order, so that a trial read back yields the same documents as the one that was written.

    Attributes:
        index: its number from 0, in the order of proposals.
        origin: what proposed it.
        settings: by group.
        objective: what is maximised; of a stopped trial the value that it was heading for; None for a failed one.
        tasks: the metric of each task, of a stopped trial that of the rows seen.
        point: the place in the unit cube.
        state: `complete`, `stopped` (the race was lost before all rows were seen) or `failed`.
        reason: why it failed.
        seed: the trial's own, drawn from the study's.
        variance: the objective's over draws of the validation rows; None where it is not known.
        seen: the share of the rows that were seen, 1 unless stopped.
        gains: what each row adds to the objective, where that is a mean over rows; the study's log alone keeps it.
    """

    index: int
    origin: Origin
    settings: Mapping[str, Setting]
    objective: float | None
    tasks: Mapping[str, float]
    point: Point
    state: State
    reason: str | None
    seed: int
    variance: float | None = None
    seen: float = 1.0
    gains: GainsByTask | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        set_field(self, "settings", dict(sorted(self.settings.items())))
        set_field(self, "tasks", {task: float(value) for task, value in sorted(self.tasks.items())})
        set_field(self, "point", tuple(float(value) for value in self.point))
        set_field(self, "objective", None if self.objective is None else float(self.objective))

    def to_json(self) -> dict[str, Any]:
        """Return the trial as JSON values without its rows; floats keep every bit, an infinite λ becomes null."""
        return {
            "index": self.index,
            "origin": self.origin,
            "state": self.state,
            "settings": {group: setting.to_json() for group, setting in self.settings.items()},
            "objective": self.objective,
            "tasks": dict(self.tasks),
            "point": list(self.point),
            "reason": self.reason,
            "seed": self.seed,
            "variance": self.variance,
            "seen": self.seen,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Trial:
        """Return the trial that `to_json` wrote."""
        return cls(
            index=value["index"],
            origin=value["origin"],
            settings={group: Setting.from_json(setting) for group, setting in value["settings"].items()},
            objective=value["objective"],
            tasks=value["tasks"],
            point=value["point"],
            state=value["state"],
            reason=value["reason"],
            seed=value["seed"],
            variance=value["variance"],
            seen=value["seen"],
        )


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """Return the complete trial with the highest objective, the earliest of equals; None without one."""
    complete = [trial for trial in trials if trial.state == "complete" and trial.objective is not None]
    return max(complete, key=lambda trial: (trial.objective, -trial.index), default=None)
