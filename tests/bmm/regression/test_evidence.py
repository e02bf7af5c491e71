from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bmm.errors import BMMError
from bmm.regression.evidence import Evidence, most_probable
from bmm.regression.posterior import decompose, factor, residual_and_energy

SEEDS = st.integers(0, 2**31)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def evidence(anchor: Tensor, experts: list[Tensor], inputs: list[Tensor]) -> Evidence:
    grams = [rows.T @ rows / rows.shape[0] for rows in inputs]
    total = torch.stack(grams).sum(0)
    pull, energy = residual_and_energy(anchor, experts, grams)
    return Evidence.of(
        factor(decompose(total, where="map"), anchor, pull), energy, sum(rows.shape[0] for rows in inputs)
    )


def dense(anchor: Tensor, experts: list[Tensor], inputs: list[Tensor], lam: float) -> float:
    """The density of all observations at once, from their whole covariance, at the most probable noise."""
    X = torch.cat([rows / math.sqrt(rows.shape[0]) for rows in inputs])
    Y = torch.cat([rows / math.sqrt(rows.shape[0]) @ expert.T for rows, expert in zip(inputs, experts, strict=True)])
    size, outputs = X.shape[0], anchor.shape[0]
    strength = lam * float((X.T @ X).trace()) / X.shape[1]
    shape = torch.eye(size, dtype=torch.float64) + X @ X.T / strength
    deviation = Y - X @ anchor.T
    noise = float((deviation * torch.linalg.solve(shape, deviation)).sum()) / (size * outputs)
    normal = torch.distributions.MultivariateNormal(torch.zeros(size, dtype=torch.float64), noise * shape)
    best = float(normal.log_prob(deviation.T).sum())
    # No other noise is more probable.
    for factor_ in (0.97, 1.03):
        other = torch.distributions.MultivariateNormal(torch.zeros(size, dtype=torch.float64), factor_ * noise * shape)
        assert float(other.log_prob(deviation.T).sum()) < best
    return best


@settings(max_examples=25, deadline=None)
@given(
    seed=SEEDS,
    outputs=st.integers(1, 4),
    inputs=st.integers(1, 6),
    rows=st.lists(st.integers(2, 9), min_size=2, max_size=3),
    exponent=st.floats(-3, 2),
)
def test_the_closed_form_is_the_density_of_the_observations(
    seed: int, outputs: int, inputs: int, rows: list[int], exponent: float
) -> None:
    anchor = draw(seed, outputs, inputs)
    experts = [anchor + 0.3 * draw(seed + 1 + index, outputs, inputs) for index in range(len(rows))]
    data = [draw(seed + 11 + index, count, inputs) for index, count in enumerate(rows)]
    lam = 10.0**exponent
    assert evidence(anchor, experts, data).log(lam) == pytest.approx(
        dense(anchor, experts, data, lam), rel=1e-7, abs=1e-7
    )


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, scale=st.sampled_from([1e-6, 0.1, 1e6]))
def test_the_scale_of_the_grams_and_of_the_weights_does_not_move_the_choice(seed: int, scale: float) -> None:
    anchor = draw(seed, 3, 5)
    experts = [anchor + draw(seed + 1 + index, 3, 5) for index in range(3)]
    data = [draw(seed + 11 + index, 20, 5) for index in range(3)]
    ends = (-4.0, 2.0)
    chosen = most_probable([evidence(anchor, experts, data)], ends)
    assert most_probable([evidence(anchor, experts, [scale * rows for rows in data])], ends) == pytest.approx(
        chosen, rel=2e-3
    )
    weights = [scale * expert for expert in experts]
    assert most_probable([evidence(scale * anchor, weights, data)], ends) == pytest.approx(chosen, rel=2e-3)


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, maps=st.integers(1, 3))
def test_nothing_on_a_fine_grid_is_more_probable_than_the_choice(seed: int, maps: int) -> None:
    found = []
    for index in range(maps):
        anchor = draw(seed + 100 * index, 3, 4)
        experts = [anchor + 10.0**-index * draw(seed + 100 * index + 1 + t, 3, 4) for t in range(2)]
        found.append(evidence(anchor, experts, [draw(seed + 100 * index + 11 + t, 9, 4) for t in range(2)]))
    chosen = most_probable(found, (-4.0, 2.0))
    best = sum(map_.log(chosen) for map_ in found)
    for step in range(301):
        lam = 10.0 ** (-4 + step * 6 / 300)
        assert sum(map_.log(lam) for map_ in found) <= best + 1e-3 * max(1.0, abs(best)) * 1e-2


@pytest.mark.parametrize("lam", [0.03, 0.3, 3.0])
def test_the_strength_that_made_the_data_is_found_again(lam: float) -> None:
    outputs, inputs, rows = 200, 30, 40
    anchor = draw(1, outputs, inputs)
    data = [draw(2, rows, inputs), draw(3, rows, inputs)]
    total = sum(part.T @ part / rows for part in data)
    strength = lam * float(total.trace()) / inputs  # type: ignore[union-attr]
    truth = anchor + draw(4, outputs, inputs) / math.sqrt(strength)
    # What the experts answer, `X_t W_tᵀ`, is the truth with noise; their weights are those that answer so.
    experts = []
    for index, part in enumerate(data):
        answers = part @ truth.T + math.sqrt(rows) * draw(5 + index, rows, outputs)
        experts.append(torch.linalg.lstsq(part, answers).solution.T)
    explained = evidence(anchor, experts, data)
    # Least squares leaves out what no weight can answer; the noise there is as strong as the rest.
    lost = sum(float((rows - inputs) * outputs) for _ in data)
    whole = replace(explained, energy=explained.energy + lost)
    assert most_probable([whole], (-4.0, 2.0)) == pytest.approx(lam, rel=0.15)


def test_experts_who_agree_need_no_prior_and_an_anchor_that_is_right_all_of_it() -> None:
    anchor, shift = draw(1, 3, 4), draw(2, 3, 4)
    data = [draw(3, 30, 4), draw(4, 30, 4)]
    assert most_probable([evidence(anchor, [anchor + shift] * 2, data)], (-4.0, 2.0)) == 1e-4
    assert most_probable([evidence(anchor, [anchor] * 2, data)], (-4.0, 2.0)) == 100.0
    silent = evidence(anchor, [anchor + shift] * 2, [torch.zeros(3, 4, dtype=torch.float64)] * 2)
    assert silent.log(0.1) == silent.log(10.0) == 0.0


def test_what_has_no_evidence_is_refused() -> None:
    anchor = draw(1, 2, 3)
    found = evidence(anchor, [anchor + 1.0], [draw(2, 5, 3)])
    for lam in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(BMMError, match="positive, finite prior strength"):
            found.log(lam)
    with pytest.raises(BMMError, match="of no maps"):
        most_probable([], (-4.0, 2.0))
