"""A model that is stopped would have lost; what it was heading for is told without bias."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bmm.evaluation.racing import PARTS, parts, verdict

modest = settings(deadline=None, max_examples=25)


@modest
@given(task=st.text(max_size=8), rows=st.integers(0, 400))
def test_every_row_is_in_one_part_and_the_order_is_the_tasks_own(task: str, rows: int) -> None:
    pieces = parts(task, rows)
    assert len(pieces) == PARTS
    assert sorted(row for piece in pieces for row in piece) == list(range(rows))
    assert parts(task, rows) == pieces
    if rows >= 64:
        assert all(len(piece) >= 16 for piece in pieces)
        assert pieces != parts(task + "'", rows)


def race(generator: np.random.Generator, gap: float, rows: int = 240) -> tuple[bool, float, float]:
    """Whether a model that errs on `gap` more rows than its rival is stopped, its whole value, and what was told."""
    rival = {task: (generator.random(rows) < 0.8).astype(float) for task in "ab"}
    other = {task: values * (generator.random(rows) > gap) for task, values in rival.items()}
    whole = float(np.mean([values.mean() for values in other.values()]))
    order = {task: parts(task, rows) for task in "ab"}
    seen: dict[str, list[int]] = {"a": [], "b": []}
    for turn in range(PARTS - 1):
        for task in seen:
            seen[task] += order[task][turn]
        found = verdict(seen, {task: other[task][seen[task]] for task in seen}, rival)
        if found is not None:
            assert found.variance > 0
            return True, whole, found.objective
    return False, whole, whole


def test_a_worse_model_is_stopped_and_an_equal_one_hardly_ever() -> None:
    generator = np.random.default_rng(0)
    worse = [race(generator, 0.3) for _ in range(60)]
    assert sum(stopped for stopped, _, _ in worse) >= 58
    # Without bias: the mean error is far below the spread of one.
    errors = [told - whole for stopped, whole, told in worse if stopped]
    assert abs(float(np.mean(errors))) < 3 * float(np.std(errors)) / len(errors) ** 0.5
    equal = 0
    for _ in range(200):
        rival = {task: (generator.random(240) < 0.8).astype(float) for task in "ab"}
        other = {task: (generator.random(240) < 0.8).astype(float) for task in "ab"}
        seen = {task: parts(task, 240)[0] for task in "ab"}
        equal += verdict(seen, {task: other[task][seen[task]] for task in seen}, rival) is not None
    assert equal <= 3


@modest
@given(gap=st.floats(0.0, 1.0), seed=st.integers(0, 99))
def test_a_model_that_answers_as_its_rival_is_never_stopped(gap: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    rival = {"a": generator.normal(size=100), "b": generator.normal(size=80)}
    seen = {"a": list(range(30)), "b": list(range(20))}
    assert verdict(seen, {task: rival[task][rows] + gap for task, rows in seen.items()}, rival) is None


@pytest.mark.parametrize("found", [{"a": np.zeros(5)}, {"a": np.zeros(1), "b": np.zeros(5)}])
def test_what_cannot_be_compared_goes_on(found: dict[str, np.ndarray]) -> None:
    rival = {"a": np.ones(10), "b": np.ones(10)}
    assert verdict({task: list(range(len(rows))) for task, rows in found.items()}, found, rival) is None
