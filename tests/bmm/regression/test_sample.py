from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bmm.errors import BMMError
from bmm.regression.posterior import Posterior, Spectrum, decompose, factor, residual
from bmm.regression.sample import (
    deviation,
    effective_rows,
    error_from_experts,
    error_from_moments,
    noise_variance,
    settled_directions,
    spread_squared,
    standard_normal,
)

OUT, IN = 3, 4
ZERO = torch.zeros(OUT, IN, dtype=torch.float64)
seeds = st.integers(0, 2**31)


def regression(seed, counts=(30, 50), out=OUT, inputs=IN):
    """Inputs and targets of some tasks as float64 arrays, and their moments as tensors."""
    rng = np.random.default_rng(seed)
    X = [rng.normal(size=(rows, inputs)) @ rng.normal(size=(inputs, inputs)) for rows in counts]
    Y = [rng.normal(size=(rows, out)) for rows in counts]
    gram = torch.from_numpy(sum(x.T @ x / len(x) for x in X))
    cross = torch.from_numpy(sum(y.T @ x / len(x) for x, y in zip(X, Y, strict=True)))
    power = torch.from_numpy(sum((y**2).sum(axis=0) / len(y) for y in Y))
    return X, Y, gram, cross, power


def posterior_of(gram, cross, anchor):
    return factor(decompose(gram, where="map.weight"), anchor, cross - anchor @ gram)


def noises(posterior, lam, variance, rows, count):
    """Many draws' deviations `(count, out, in)`."""
    return torch.stack(
        [
            deviation(posterior, lam, variance, rows, standard_normal(5, index, "map", (OUT, IN)))
            for index in range(count)
        ]
    )


@settings(deadline=None, max_examples=25)
@given(seed=seeds, counts=st.lists(st.integers(1, 40), min_size=1, max_size=4))
def test_the_error_is_that_of_the_rows(seed, counts):
    X, Y, gram, cross, power = regression(seed, counts)
    W = np.random.default_rng(seed + 1).normal(size=(OUT, IN))
    expected = sum(((x @ W.T - y) ** 2).sum(axis=0) / len(x) for x, y in zip(X, Y, strict=True))
    found = error_from_moments(torch.from_numpy(W), gram, cross, power)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-9 * float(power.max()))


@settings(deadline=None, max_examples=25)
@given(seed=seeds, counts=st.lists(st.integers(1, 40), min_size=1, max_size=4))
def test_the_error_to_experts_is_that_of_their_answers(seed, counts):
    X, _, gram, _, _ = regression(seed, counts)
    rng = np.random.default_rng(seed + 1)
    W, *experts = rng.normal(size=(1 + len(X), OUT, IN))
    grams = [torch.from_numpy(x.T @ x / len(x)) for x in X]
    tensors = [torch.from_numpy(expert) for expert in experts]
    expected = sum(((x @ (W - expert).T) ** 2).mean(axis=0) for x, expert in zip(X, experts, strict=True))
    found = error_from_experts(torch.from_numpy(W), tensors, grams)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)
    # The same through moments, with the experts' answers as targets.
    cross = sum(expert @ part for expert, part in zip(tensors, grams, strict=True))
    power = sum(((expert @ part) * expert).sum(dim=1) for expert, part in zip(tensors, grams, strict=True))
    again = error_from_moments(torch.from_numpy(W), gram, cross, power)
    np.testing.assert_allclose(again.numpy(), expected, rtol=1e-6, atol=1e-9)


def test_a_perfect_fit_has_no_error_and_no_width():
    X, _, gram, _, _ = regression(0)
    W = torch.from_numpy(np.random.default_rng(1).normal(size=(OUT, IN)))
    error = error_from_experts(W, [W, W], [torch.from_numpy(x.T @ x / len(x)) for x in X])
    assert torch.equal(error, torch.zeros(OUT, dtype=torch.float64))
    posterior = posterior_of(gram, W @ gram, ZERO)
    variance = noise_variance(posterior, 0.1, error, 30.0, 2)
    assert not bool(deviation(posterior, 0.1, variance, 30.0, torch.ones(OUT, IN)).any())


@given(counts=st.lists(st.integers(1, 1000), min_size=1, max_size=6))
def test_effective_rows_are_kishs_effective_sample_size(counts):
    weights = [1 / count for count in counts for _ in range(count)]
    kish = sum(weights) ** 2 / sum(weight**2 for weight in weights)
    assert effective_rows(counts) * len(counts) == pytest.approx(kish)
    assert effective_rows(counts) <= sum(counts) / len(counts) + 1e-9
    assert effective_rows([counts[0]] * 3) == pytest.approx(counts[0])


@pytest.mark.parametrize("counts", [[], [3, 0]])
def test_rows_are_needed(counts):
    with pytest.raises(BMMError, match="rows for every task"):
        effective_rows(counts)


@settings(deadline=None, max_examples=25)
@given(seed=seeds, log_lambda=st.floats(-4, 3))
def test_settled_directions_are_the_trace_of_the_hat_matrix(seed, log_lambda):
    X, _, gram, cross, _ = regression(seed)
    lam = 10.0**log_lambda
    posterior = posterior_of(gram, cross, ZERO)
    ridge = lam * float(gram.trace()) / IN
    stacked = np.vstack([x / math.sqrt(len(x)) for x in X])
    hat = stacked @ np.linalg.solve(stacked.T @ stacked + ridge * np.eye(IN), stacked.T)
    assert settled_directions(posterior, lam) == pytest.approx(np.trace(hat), rel=1e-6)


def test_settled_directions_reach_from_none_to_the_rank():
    _, _, gram, cross, _ = regression(0, counts=(1, 1))
    posterior = posterior_of(gram, cross, ZERO)
    assert settled_directions(posterior, math.inf) == 0
    assert settled_directions(posterior, 0.0) == pytest.approx(2)


def test_the_noise_is_found():
    """1/β is unbiased without a prior: over 400 repetitions its mean is within five standard errors of the truth."""
    rng = np.random.default_rng(0)
    X = [rng.normal(size=(25, IN)), rng.normal(size=(25, IN))]
    sigma, truth = np.array([0.1, 1.0, 3.0]), rng.normal(size=(OUT, IN))
    gram = torch.from_numpy(sum(x.T @ x / len(x) for x in X))
    found = []
    for _ in range(400):
        Y = [x @ truth.T + sigma * rng.normal(size=(len(x), OUT)) for x in X]
        cross = torch.from_numpy(sum(y.T @ x / len(x) for x, y in zip(X, Y, strict=True)))
        power = torch.from_numpy(sum((y**2).mean(axis=0) for y in Y))
        posterior = posterior_of(gram, cross, ZERO)
        error = error_from_moments(posterior.mean(0.0), gram, cross, power)
        found.append(noise_variance(posterior, 0.0, error, effective_rows([25, 25]), 2).numpy())
    estimates = np.stack(found)
    standard_error = estimates.std(axis=0) / math.sqrt(len(estimates))
    np.testing.assert_array_less(np.abs(estimates.mean(axis=0) - sigma**2), 5 * standard_error)


def test_as_few_rows_as_directions_leave_a_finite_noise():
    _, _, gram, cross, power = regression(0, counts=(1, 1))
    posterior = posterior_of(gram, cross, ZERO)
    error = error_from_moments(posterior.mean(0.0), gram, cross, power)
    assert bool(torch.isfinite(noise_variance(posterior, 0.0, error, 1.0, 2)).all())


@pytest.mark.parametrize("lam", [0.0, 0.1, 10.0])
def test_many_draws_have_the_closed_forms_covariance(lam):
    """6,000 draws: no entry is more than five standard errors off, `se² = (C_ii C_jj + C_ij²)/draws`."""
    _, _, gram, cross, _ = regression(3)
    posterior = posterior_of(gram, cross, ZERO)
    variance, rows, count = torch.tensor([0.5, 1.0, 4.0]).double(), 37.5, 6_000
    ridge = lam * float(gram.trace()) / IN
    inverse = np.linalg.inv(gram.numpy() + ridge * np.eye(IN)) / rows
    closed = np.kron(np.diag(variance.numpy()), inverse)
    assert spread_squared(posterior, lam, variance, rows) == pytest.approx(np.trace(closed))
    flat = noises(posterior, lam, variance, rows, count).reshape(count, -1).numpy()
    spread = np.sqrt(np.diag(closed))
    np.testing.assert_array_less(np.abs(flat.mean(axis=0)), 5 * spread / math.sqrt(count))
    standard_error = np.sqrt((np.outer(spread, spread) ** 2 + closed**2) / count)
    np.testing.assert_array_less(np.abs(flat.T @ flat / count - closed), 5 * standard_error)


def test_the_width_is_the_sampling_variance_of_the_mean_where_tasks_share_a_gram():
    """With one Gram, no prior and unequal rows: the mean's own covariance over fresh noise, exactly."""
    rng = np.random.default_rng(0)
    root = rng.normal(size=(IN, IN))
    X = [np.linalg.qr(rng.normal(size=(rows, IN)))[0] * math.sqrt(rows) @ root for rows in (8, 40)]
    gram = sum(x.T @ x / len(x) for x in X)
    # Ŵ is linear in the targets: Ŵ = Σ Y_tᵀ X_t/rows_t (ΣG)⁻¹.
    maps = [x @ np.linalg.inv(gram) / len(x) for x in X]
    exact = sum(m.T @ m for m in maps)
    width = np.linalg.inv(gram) / effective_rows([8, 40])
    np.testing.assert_allclose(width, exact, rtol=1e-9)
    posterior = posterior_of(torch.from_numpy(gram), ZERO, ZERO)
    each = [
        deviation(posterior, 0.0, torch.ones(OUT), effective_rows([8, 40]), one.reshape(OUT, IN))
        for one in torch.eye(OUT * IN, dtype=torch.float64)
    ]
    root_of_covariance = torch.stack(each).reshape(OUT * IN, OUT * IN).numpy()
    np.testing.assert_allclose(
        root_of_covariance.T @ root_of_covariance, np.kron(np.eye(OUT), exact), rtol=1e-8, atol=1e-12
    )


@settings(deadline=None, max_examples=15)
@given(seed=seeds, log_lambda=st.floats(-4, 3))
def test_a_draw_does_not_depend_on_the_eigensolvers_signs(seed, log_lambda):
    _, _, gram, cross, _ = regression(seed)
    posterior = posterior_of(gram, cross, ZERO)
    spectrum = posterior.spectrum
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
    flipped = Spectrum(spectrum.eigenvectors * signs, spectrum.eigenvalues, spectrum.trace)
    other = Posterior(flipped, posterior.anchor, posterior.projection * signs)
    normal, variance = standard_normal(seed, 0, "map", (OUT, IN)), torch.ones(OUT)
    lam = 10.0**log_lambda
    torch.testing.assert_close(
        deviation(posterior, lam, variance, 9.0, normal), deviation(other, lam, variance, 9.0, normal)
    )


def test_unseen_directions_keep_the_anchor_without_a_prior_and_the_priors_width_with_one():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, IN))
    x[:, 2] = 0
    gram = torch.from_numpy(x.T @ x / 50)
    posterior = posterior_of(gram, ZERO, ZERO + 1)
    normal, variance = standard_normal(0, 0, "map", (OUT, IN)), torch.full((OUT,), 4.0).double()
    flat = deviation(posterior, 0.0, variance, 50.0, normal)
    assert not bool(flat[:, 2].any())
    assert bool(flat[:, [0, 1, 3]].any(dim=0).all())
    ridge = 0.1 * float(gram.trace()) / IN
    wide = deviation(posterior, 0.1, variance, 50.0, normal)
    torch.testing.assert_close(wide[:, 2], 2.0 * normal[:, 2] / math.sqrt(50 * ridge))


def test_nothing_is_drawn_where_the_anchor_was_kept():
    _, _, gram, cross, _ = regression(0)
    posterior = posterior_of(gram, cross, ZERO)
    for one, lam in ((posterior, math.inf), (posterior_of(gram * 0, cross * 0, ZERO + 1), 1.0)):
        assert not bool(deviation(one, lam, torch.ones(OUT), 5.0, torch.ones(OUT, IN)).any())


def test_normals_depend_on_seed_index_and_module_alone():
    first = standard_normal(1, 2, "layer.0", (4, 5))
    assert first.dtype == torch.float64
    standard_normal(1, 3, "layer.0", (4, 5))
    assert torch.equal(first, standard_normal(1, 2, "layer.0", (4, 5)))
    for other in ((2, 2, "layer.0"), (1, 3, "layer.0"), (1, 2, "layer.1")):
        assert not bool((first == standard_normal(*other, (4, 5))).any())


def test_shapes_that_do_not_fit_are_refused():
    _, _, gram, cross, power = regression(0)
    with pytest.raises(BMMError, match="moments of shapes"):
        error_from_moments(torch.zeros(OUT, IN), gram, cross, power[:2])
    posterior = posterior_of(gram, cross, ZERO)
    with pytest.raises(BMMError, match="does not fit a map"):
        deviation(posterior, 0.1, torch.ones(OUT), 1.0, torch.ones(OUT, IN + 1))
    with pytest.raises(BMMError, match="prior strength"):
        deviation(posterior, -1.0, torch.ones(OUT), 1.0, torch.ones(OUT, IN))


def test_the_experts_residual_belongs_to_the_module_wise_mean():
    """`e` at the mean is the least there is: any other weight leaves a larger penalised error."""
    X, _, gram, _, _ = regression(2)
    rng = np.random.default_rng(0)
    anchor, *experts = (torch.from_numpy(part) for part in rng.normal(size=(3, OUT, IN)))
    grams = [torch.from_numpy(x.T @ x / len(x)) for x in X]
    posterior = factor(decompose(gram, where="map.weight"), anchor, residual(anchor, experts, grams))
    mean = posterior.mean(0.0)
    best = error_from_experts(mean, experts, grams)
    for index in range(5):
        other = mean + 0.1 * standard_normal(0, index, "map", (OUT, IN))
        assert bool((error_from_experts(other, experts, grams) > best).all())
