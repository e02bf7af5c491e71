"""What mattered is told from what did not."""

from __future__ import annotations

import random

import pytest

from bmm.search.importance import importance
from bmm.search.plan import Plan
from bmm.search.space import Space
from bmm.search.trial import Trial

SPACE = Space(("a", "b", "c"), (-4.0, 2.0), (0.5, 1.5))
PLAN = Plan(trials=40, seed=0)


def trials(count: int, value: float | None = None) -> list[Trial]:
    draw = random.Random(1)
    made = []
    for index in range(count):
        point = tuple(round(draw.random(), 6) for _ in range(SPACE.dimensions))
        found = -((point[0] - 0.4) ** 2) - 0.2 * (point[3] - 0.6) ** 2 if value is None else value
        made.append(Trial(index, "random", SPACE.decode(point), found, {}, point, "complete", None, 0))
    return made


def test_axes_are_ranked_by_what_they_account_for() -> None:
    found = importance(SPACE, trials(40), PLAN)
    assert [entry["name"] for entry in found[:2]] == ["λ of a", "γ of b"]
    assert found[0]["share"] > 0.7
    assert 0.02 < found[1]["share"] < 0.4
    assert all(entry["share"] < 0.05 for entry in found[2:])
    assert found[0]["length_scale"] < found[-1]["length_scale"]
    assert importance(SPACE, trials(40), PLAN) == found


@pytest.mark.parametrize("history", [[], trials(5), trials(20, value=0.5)])
def test_trials_that_tell_nothing_rank_nothing(history: list[Trial]) -> None:
    assert importance(SPACE, history, PLAN) == []
