"""What a recipe says of its nights, under `nightly`: when, what of broken experts, what passes the gate, who is told.

One file says all of a merge, so these words stand in the recipe itself: `bmm merge` reads the same file by hand, and
where experts are to be found (`find`) stands with the experts. They change nothing of a merged model, and are no part
of what a merge is known by. Words only; nothing is imported that a night without news would wait for.
"""

from __future__ import annotations

from typing import Literal
from zoneinfo import ZoneInfo

from pydantic import Field, field_validator

from bmm.part import Part

Outcome = Literal["promoted", "rejected", "unchanged", "failed"]
OUTCOMES: tuple[Outcome, ...] = ("promoted", "rejected", "unchanged", "failed")


class Schedule(Part):
    """When a night begins."""

    cron: str = Field(default="0 3 * * *", description="minute, hour, day of the month, month, day of the week")
    timezone: str = Field(default="UTC", description="where that time is, for example Europe/Berlin")

    @field_validator("timezone")
    @classmethod
    def _known(cls, value: str) -> str:
        try:
            ZoneInfo(value)
        except (KeyError, ValueError, OSError):
            raise ValueError("there is no such time zone; name one as Europe/Berlin or UTC") from None
        return value


class Gate(Part):
    """What a new model has to show on the test rows before it becomes the champion.

    Scores are those of the tasks' metrics, between 0 and 1 (0.01 is a point of accuracy). Against the champion both are
    measured on the same rows, of the tasks that both have; the floors hold for every task, the new ones too.
    """

    gain: float = Field(
        default=0.0, ge=-1, le=1, description="least difference of the mean score to the champion's; may be below 0"
    )
    certainty: float = Field(
        default=0.5,
        ge=0,
        lt=1,
        description="least share of the paired bootstrap's resamples in which the difference is that large",
    )
    loss: float = Field(default=0.05, ge=0, le=1, description="most that any one task may lose against the champion")
    mean: float = Field(default=0.0, le=1, description="least mean score over all tasks")
    tasks: dict[str, float] = Field(default_factory=dict, description="least score of a task, by the expert's name")


class Nightly(Part):
    """A merge that is looked after every night (`bmm nightly`, `bmm deploy`)."""

    model: str | None = Field(
        default=None,
        pattern=r"^[^/:.%'\"`\\]+$",
        max_length=120,
        description="its name in the MLflow registry (default: the names of the recipe's folder and of the output)",
    )
    schedule: Schedule = Schedule()
    broken: Literal["leave-out", "stop"] = Field(
        default="leave-out", description="merge without an expert that cannot be used, and say so, or stop the night"
    )
    gate: Gate = Gate()
    tell: tuple[Outcome, ...] = Field(
        default=OUTCOMES, description="which nights are told to the addresses in BMM_NOTIFY"
    )
