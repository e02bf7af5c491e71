"""A head's fit against its closed form in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bmm.errors import BMMError
from bmm.regression.head import fitted_head


def drawn(rows: int, features: int, classes: int, seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    sizes = ((rows, features), (rows, classes), (classes, features), (classes,))
    return tuple(torch.randn(size, generator=generator) for size in sizes)


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 40), st.integers(1, 12), st.integers(1, 5), st.floats(1e-3, 1e3), st.booleans(), st.integers(0, 99)
)
def test_it_is_the_posterior_mean(rows: int, features: int, classes: int, lam: float, biased: bool, seed: int) -> None:
    inputs, answers, weight, bias = drawn(rows, features, classes, seed)
    found = fitted_head(inputs, answers, weight, bias if biased else None, lam)
    x, y, prior = inputs.double(), answers.double(), weight.double()
    if biased:
        x, prior = torch.cat([x, torch.ones(rows, 1)], dim=1), torch.cat([prior, bias.double()[:, None]], dim=1)
    gram = x.T @ x / rows
    strength = lam * max(1.0, 256 / rows) * float(gram.trace()) / len(gram)
    right = y.T @ x / rows + strength * prior
    expected = torch.linalg.solve(gram + strength * torch.eye(len(gram)), right.T).T
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=2e-4)


@settings(deadline=None, max_examples=15)
@given(st.floats(1e-2, 10), st.integers(0, 99))
def test_where_the_merged_model_reads_as_the_expert_does_its_head_stays(lam: float, seed: int) -> None:
    inputs, _, weight, bias = drawn(30, 6, 3, seed)
    found = fitted_head(inputs, inputs @ weight.T + bias, weight, bias, lam)
    torch.testing.assert_close(found, torch.cat([weight, bias[:, None]], dim=1), rtol=1e-4, atol=1e-4)


def test_fewer_rows_count_for_less() -> None:
    inputs, answers, weight, bias = drawn(1024, 6, 3, 0)
    prior = torch.cat([weight, bias[:, None]], dim=1)
    moved = [
        float((fitted_head(inputs[:rows], answers[:rows], weight, bias, 0.1) - prior).norm()) for rows in (8, 64, 1024)
    ]
    plain = fitted_head(inputs[:256], answers[:256], weight, bias, 0.1)
    assert moved[0] < moved[1] < moved[2]
    # The same rows four times over are as many rows.
    again = fitted_head(inputs[:256].repeat(4, 1), answers[:256].repeat(4, 1), weight, bias, 0.1)
    torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-5)


def test_a_strong_prior_keeps_the_head_and_rows_have_to_pair_up() -> None:
    inputs, answers, weight, bias = drawn(30, 6, 3, 0)
    found = fitted_head(inputs, answers, weight, bias, 1e12)
    torch.testing.assert_close(found, torch.cat([weight, bias[:, None]], dim=1), rtol=1e-5, atol=1e-5)
    with pytest.raises(BMMError, match="30 rows of a head's inputs were given with 29 answers"):
        fitted_head(inputs, answers[1:], weight, bias, 0.1)
