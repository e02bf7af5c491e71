from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bmm.evaluation.metrics import Bootstrap, Measured
from bmm.evaluation.scores import CLASSIFICATION
from bmm.nightly.gate import Champion, Verdict, judge
from bmm.nightly.settings import Gate
from bmm.recipe import EvaluationSettings

ACCURACY = CLASSIFICATION["accuracy"]
EVALUATION = EvaluationSettings(bootstrap_samples=300)


def answers(right: int, rows: int = 200, first: int = 0) -> Measured:
    """A model that is right on so many rows of two classes, the first or others."""
    import torch

    logits = torch.tensor([[0.0, 1.0] if (row - first) % rows < right else [1.0, 0.0] for row in range(rows)])
    return Measured(ACCURACY, ACCURACY.statistics(logits, [1] * rows))


def verdict(new: dict[str, int], champion: dict[str, int] | None, **gate: object) -> Verdict:
    theirs = None if champion is None else Champion("7", {task: answers(right) for task, right in champion.items()})
    return judge({task: answers(right) for task, right in new.items()}, theirs, Gate.model_validate(gate), EVALUATION)


def test_the_first_model_passes_if_the_floors_do() -> None:
    assert verdict({"a": 100, "b": 120}, None).passed
    assert verdict({"a": 100, "b": 120}, None, tasks={"a": 0.5}, mean=0.55).passed
    low = verdict({"a": 100, "b": 120}, None, tasks={"a": 0.51}, mean=0.56)
    assert low.reasons == (
        "a has 50.0, below its floor of 51.0",
        "the mean over all tasks is 55.0, below its floor of 56.0",
    )
    assert [row.champion for row in low.rows] == [None] * 3


def test_better_passes_worse_does_not_and_the_same_does() -> None:
    assert verdict({"a": 130, "b": 120}, {"a": 120, "b": 120}).passed
    worse = verdict({"a": 118, "b": 120}, {"a": 120, "b": 120})
    assert worse.reasons == ("the mean is 59.5, the champion's 60.0: -0.5 points, and at least +0.0 are asked for",)
    same = verdict({"a": 120, "b": 120}, {"a": 120, "b": 120})
    assert (same.passed, same.certainty) == (True, 0.5)
    assert verdict({"a": 118, "b": 120}, {"a": 120, "b": 120}, gain=-0.01).passed


def test_one_task_may_not_pay_for_another() -> None:
    found = verdict({"a": 160, "b": 100}, {"a": 120, "b": 120})
    (reason,) = found.reasons
    assert reason == "b has 50.0, 10.0 below the champion's 60.0 (at most 5.0 are allowed)"
    assert verdict({"a": 160, "b": 100}, {"a": 120, "b": 120}, loss=0.1).passed


def test_certainty_asks_for_more_than_luck() -> None:
    # Two rows more, but other rows: by chance as often as not.
    new, old = {"a": answers(102, first=50)}, Champion("1", {"a": answers(100)})
    assert judge(new, old, Gate(), EVALUATION).passed
    found = judge(new, old, Gate(certainty=0.95), EVALUATION)
    assert not found.passed
    assert "95% are asked for" in found.reasons[0]
    assert verdict({"a": 160}, {"a": 100}, certainty=0.95).passed


def test_new_tasks_count_for_the_floors_alone_and_withdrawn_ones_for_nothing() -> None:
    found = verdict({"a": 120, "new": 20}, {"a": 120, "gone": 200}, mean=0.3)
    assert found.passed
    assert [(row.task, row.note) for row in found.rows] == [
        ("a", ""),
        ("new", "new"),
        ("mean", "of the 1 tasks that both have"),
    ]
    assert not verdict({"a": 120, "new": 20}, {"a": 120}, tasks={"new": 0.5}).passed
    lost = judge({"a": answers(150)}, Champion("1", {"a": answers(100)}, lost={"b": "NaN"}), Gate(), EVALUATION)
    assert lost.reasons == ("it lacks b, which the champion has, since its expert is broken (NaN)",)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 199), st.integers(1, 199), st.integers(-40, 40))
def test_the_verdict_agrees_with_the_numbers(new: int, old: int, wanted: int) -> None:
    # Half a row more, so that no rounding decides.
    found = verdict({"a": new}, {"a": old}, gain=(wanted + 0.5) / 200, loss=1, certainty=0)
    assert found.passed == (new - old > wanted)
    mean = found.rows[-1]
    assert mean.low is not None
    assert mean.high is not None
    assert mean.difference == pytest.approx((new - old) / 200)
    assert mean.low <= mean.difference + 1e-9
    assert mean.high >= mean.difference - 1e-9
    assert found.to_json()["passed"] == found.passed


def test_certainty_of_the_bootstrap_counts_ties_as_half() -> None:
    measured = {"a": {"x": answers(100), "y": answers(100), "z": answers(150)}}
    bootstrap = Bootstrap(measured, samples=200, seed=0, confidence=0.9)
    assert bootstrap.certainty("x", "y") == 0.5
    assert bootstrap.certainty("z", "x") == 1.0
    assert bootstrap.certainty("x", "z") == 0.0
    assert bootstrap.certainty("z", "x", least=0.9) == 0.0
