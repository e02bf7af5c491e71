from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bmm.grams.products import ROWS_IN_FLOAT32, ProductSum
from bmm.threads import one_thread


def added(parts: list[torch.Tensor], size: int) -> ProductSum:
    made = ProductSum(size)
    for part in parts:
        made.add(part)
    return made


@settings(deadline=None, max_examples=25)
@given(size=st.sampled_from([1, 2, 7, 255, 256, 257, 300]), counts=st.lists(st.integers(0, 9), max_size=5))
def test_a_sum_of_small_integers_is_exact_and_symmetric(size: int, counts: list[int]) -> None:
    torch.manual_seed(size)
    parts = [torch.randint(-3, 4, (count, size)).to(torch.float32) for count in counts]
    made = added(parts, size)
    rows = torch.cat([torch.zeros(0, size), *parts]).double()
    assert made.rows == len(rows)
    assert torch.equal(made.total(), rows.T @ rows)
    assert made.total().dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rows_of_any_dtype_and_any_layout_are_added(dtype: torch.dtype) -> None:
    rows = torch.arange(24.0).reshape(4, 6).to(dtype)
    with torch.inference_mode():
        sums = [added([rows.T], 4), added([rows[:, ::2]], 3)]
    exact = rows.double()
    assert torch.equal(sums[0].total(), exact @ exact.T)
    assert torch.equal(sums[1].total(), exact[:, ::2].T @ exact[:, ::2])


def test_many_rows_are_summed_in_float64() -> None:
    torch.manual_seed(0)
    rows = torch.randn(20 * ROWS_IN_FLOAT32, 24) + 0.5
    wanted = rows.double().T @ rows.double()
    found = added(list(rows.split(1000)), 24).total()
    assert float((found - wanted).norm() / wanted.norm()) < 5e-8


def test_sums_can_be_joined_and_go_on() -> None:
    torch.manual_seed(1)
    one, two, three = (torch.randint(-3, 4, (count, 5)).to(torch.float32) for count in (3, 4, 2))
    made, other = added([one], 5), added([two], 5)
    assert made.total() is not None
    made.include(other)
    made.add(three)
    rows = torch.cat([one, two, three]).double()
    assert made.rows == 9
    assert torch.equal(made.total(), rows.T @ rows)
    assert torch.equal(other.total(), two.double().T @ two.double())


def test_the_same_rows_give_the_same_bytes_whatever_the_number_of_threads_before() -> None:
    torch.manual_seed(2)
    parts = list(torch.randn(900, 300).split(128))
    totals = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        with one_thread():
            totals.append(added(parts, 300).total())
        assert torch.get_num_threads() == threads
        torch.set_num_threads(before)
    assert torch.equal(*totals)


def test_what_is_not_finite_shows() -> None:
    rows = torch.ones(3, 4)
    rows[1, 2] = torch.inf
    assert not bool(torch.isfinite(added([rows, torch.ones(2, 4)], 4).total()).all())


def test_rows_on_another_device_are_added_there() -> None:
    torch.manual_seed(3)
    rows = torch.randint(-3, 4, (9, 5)).to(torch.float32)
    made = added([rows[:4]], 5)
    # As for rows of a GPU, which most machines that run this have not.
    made._add_there(rows[4:])
    assert torch.equal(made.total(), rows.double().T @ rows.double())
