"""Every acquisition function proposes, knows what is pending, and keeps to what it is told of floors."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from bmm.search.bayesian import bayesian
from bmm.search.plan import Plan
from bmm.search.region import TrustRegion
from bmm.search.space import Point, Space
from bmm.search.trial import Trial

SPACE = Space(("a", "b"), (-4.0, 2.0), (0.5, 1.5))
WHOLE = TrustRegion((0.0,) * 4, 1.0)
EXPERTS = {"news": 1.0, "mail": 1.0}
PLAN = Plan(trials=40, seed=0, experts=EXPERTS)


def value(point: Point) -> float:
    """Best where λ of the first group is at 0.8."""
    return 1.0 - (point[0] - 0.8) ** 2 - 0.1 * (point[2] - 0.5) ** 2


def shares(point: Point) -> dict[str, float]:
    """One task wants λ of the first group large, the other small."""
    return {"news": 1.0 - (point[0] - 0.9) ** 2, "mail": 1.0 - (point[0] - 0.1) ** 2}


def history(count: int = 24) -> list[Trial]:
    draw = random.Random(4)
    made = []
    for index in range(count):
        point = tuple(round(draw.random(), 6) for _ in range(SPACE.dimensions))
        made.append(
            Trial(
                index, "sobol", SPACE.decode(point), value(point), shares(point), point, "complete", None, 0, 1e-5, 1.0
            )
        )
    return made


@pytest.mark.parametrize(
    "plan",
    [
        PLAN,
        replace(PLAN, searcher="saas"),
        replace(PLAN, floors={"mail": 0.9}),
        replace(PLAN, worst_task=True),
        replace(PLAN, worst_task=True, floors={"news": 0.5, "mail": 0.5}),
    ],
    ids=["plain", "saas", "floors", "worst", "both"],
)
def test_each_way_proposes_and_does_so_again(plan: Plan) -> None:
    point = bayesian(SPACE, history(), [], WHOLE, plan, 7)
    assert point is not None
    assert all(0 <= place <= 1 for place in point)
    assert bayesian(SPACE, history(), [], WHOLE, plan, 7) == point


def test_the_plain_and_the_sparse_model_find_the_top() -> None:
    for plan in (PLAN, replace(PLAN, searcher="saas")):
        point = bayesian(SPACE, history(), [], WHOLE, plan, 1)
        assert point is not None
        assert point[0] == pytest.approx(0.8, abs=0.12)


def test_a_floor_keeps_a_proposal_where_the_task_does_well() -> None:
    free = bayesian(SPACE, history(), [], WHOLE, PLAN, 1)
    floored = bayesian(SPACE, history(), [], WHOLE, replace(PLAN, floors={"mail": 0.84}), 1)
    assert free is not None
    assert floored is not None
    # Beyond 0.5 the second task is below its floor.
    assert shares(free)["mail"] < 0.84
    assert shares(floored)["mail"] > 0.8


def test_what_is_pending_is_not_proposed_again() -> None:
    first = bayesian(SPACE, history(), [], WHOLE, PLAN, 1)
    assert first is not None
    second = bayesian(SPACE, history(), [first], WHOLE, PLAN, 1)
    assert second is not None
    assert max(abs(one - two) for one, two in zip(first, second, strict=True)) > 1e-3


def test_too_few_trials_propose_nothing() -> None:
    assert bayesian(SPACE, history(2), [], WHOLE, PLAN, 0) is None


def test_nothing_is_compiled_on_the_users_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.utils.cpp_extension
    from botorch.acquisition.multi_objective import logei

    def compiled(*arguments: object, **options: object) -> None:
        raise AssertionError("a compiler was called")

    monkeypatch.setattr(torch.utils.cpp_extension, "load", compiled)
    monkeypatch.setattr(logei, "_load_attempted", False)
    assert bayesian(SPACE, history(), [], WHOLE, replace(PLAN, worst_task=True), 3) is not None
    assert logei._C is None
