from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bmm.errors import BMMError
from bmm.regression.posterior import decompose, factor
from bmm.regression.ridge import Ridge, serves


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(seed=st.integers(0, 1000), size=st.integers(1, 40), rows=st.integers(1, 60), exponent=st.floats(-3, 2))
@settings(max_examples=25, deadline=None)
def test_it_is_what_the_eigendecomposition_gives(seed: int, size: int, rows: int, exponent: float) -> None:
    inputs, lam = draw(seed, rows, size), 10**exponent
    gram = inputs.T @ inputs
    anchor, pull = draw(seed + 1, 3, size), draw(seed + 2, 3, size) @ gram
    ridge = Ridge(gram, lam, where="x")
    wanted = factor(decompose(gram, where="x"), anchor, pull)
    torch.testing.assert_close(ridge.mean(anchor, pull), wanted.mean(lam), rtol=1e-9, atol=1e-9)
    assert ridge.condition == pytest.approx(wanted.condition(lam), rel=2e-3)


def test_without_a_row_the_anchor_is_kept() -> None:
    ridge = Ridge(torch.zeros(4, 4), 0.1, where="x")
    anchor = draw(0, 2, 4)
    assert torch.equal(ridge.mean(anchor, torch.zeros(2, 4)), anchor)
    assert ridge.trace == 0
    assert ridge.condition == float("inf")


def test_a_matrix_that_is_no_gram_is_refused() -> None:
    for diagonal in ([1.0, -0.5, 1.0], [1.0] * 20 + [-1e-2]):
        with pytest.raises(BMMError, match="the Gram matrix of x has a negative eigenvalue"):
            Ridge(torch.diag(torch.tensor(diagonal, dtype=torch.float64)), 0.1, where="x")
    with pytest.raises(BMMError, match="not symmetric"):
        Ridge(draw(0, 4, 4), 0.1, where="x")


def test_where_a_direction_may_be_unseen_it_does_not_serve() -> None:
    assert serves(14336, 0.1)
    assert not serves(14336, 1e-3)
    assert not serves(8, 0.0)
    with pytest.raises(BMMError, match="too small"):
        Ridge(torch.eye(8), 1e-9, where="x")
