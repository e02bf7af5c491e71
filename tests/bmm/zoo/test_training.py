"""The order of rows and the course of the learning rate; training itself is in `test_experts`."""

from __future__ import annotations

from bmm.zoo.sets import Row
from bmm.zoo.training import batches, learning_rate_factor


def test_batches_visit_every_row_once_a_pass() -> None:
    rows: list[Row] = [(str(index), "a") for index in range(6)]
    drawn = list(batches(rows, 4, 6, seed=0))
    flat = [row for batch in drawn for row in batch]
    assert [len(batch) for batch in drawn] == [4] * 6
    for start in range(0, 24, 6):
        assert sorted(flat[start : start + 6]) == rows
    assert drawn == list(batches(rows, 4, 6, seed=0)) != list(batches(rows, 4, 6, seed=1))


def test_the_learning_rate_rises_then_falls_to_zero() -> None:
    factors = [learning_rate_factor(step, 20, 5) for step in range(21)]
    assert factors[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert factors[5:] == sorted(factors[5:], reverse=True)
    assert factors[5] == 1.0
    assert factors[20] == 0.0
