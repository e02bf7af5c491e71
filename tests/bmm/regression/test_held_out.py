from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bmm.modules.linear import LinearMap
from bmm.regression.held_out import LOG10_RANGE, best_lambda, is_held_out
from bmm.regression.moments import Moments, TaskSums

MAP = LinearMap("m", 3, 12, "m", "other", None, "m.weight", "m.bias")


def moments(seed: int, rows: int, truth: torch.Tensor, noise: float) -> Moments:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, 12, generator=generator)
    sums = TaskSums([MAP])
    targets = inputs @ truth[:, :12].T + truth[:, 12] + noise * torch.randn(rows, 3, generator=generator)
    sums.add(inputs, {"m": targets})
    return sums.moments()


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 999), rows=st.integers(5, 60), noise=st.floats(0.1, 5))
def test_no_other_strength_errs_less_on_the_rows_held_out(seed: int, rows: int, noise: float) -> None:
    truth = torch.randn(3, 13, generator=torch.Generator().manual_seed(seed))
    anchor = torch.zeros(3, 13, dtype=torch.float64)
    fit, held_out = moments(seed + 1, rows, truth, noise), moments(seed + 2, 200, truth, noise)
    spectrum = fit.spectrum("m")
    posterior = fit.posterior(spectrum, "m", anchor)
    chosen = held_out.error("m", posterior.mean(best_lambda(fit, held_out, spectrum, "m", anchor)))
    grid = torch.linspace(*LOG10_RANGE, 61).tolist()
    assert chosen <= 1.02 * min(held_out.error("m", posterior.mean(10**exponent)) for exponent in grid)


def test_an_anchor_that_is_right_is_kept_and_one_that_is_wrong_is_left() -> None:
    truth = torch.randn(3, 13, generator=torch.Generator().manual_seed(0))
    fit, held_out = moments(1, 20, truth, 1.0), moments(2, 200, truth, 1.0)
    spectrum = fit.spectrum("m")
    assert best_lambda(fit, held_out, spectrum, "m", truth.double()) > 10
    assert best_lambda(fit, held_out, spectrum, "m", truth.double() + 5) < 1


def test_a_quarter_of_the_rows_is_held_out() -> None:
    assert [row for row in range(12) if is_held_out(row)] == [1, 5, 9]
