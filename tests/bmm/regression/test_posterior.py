from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bmm.errors import BMMError
from bmm.regression.posterior import RELATIVE_CUTOFF, assemble, decompose, factor, residual

OUT, IN = 4, 6
seeds = st.integers(0, 2**31)


def draw(seed, experts=3, rows=40, out=OUT, inputs=IN):
    """Inputs, their Grams, experts and an anchor, as float64 numpy arrays."""
    rng = np.random.default_rng(seed)
    X = [
        rng.normal(size=(rows, inputs)) * rng.uniform(0.3, 3, inputs) @ np.linalg.qr(square)[0]
        for square in rng.normal(size=(experts, inputs, inputs))
    ]
    grams = [x.T @ x / rows for x in X]
    weights = [rng.normal(size=(out, inputs)) for _ in range(experts)]
    return X, grams, weights, rng.normal(size=(out, inputs))


def posterior_of(grams, weights, anchor):
    grams, weights = [torch.as_tensor(g) for g in grams], [torch.as_tensor(w) for w in weights]
    anchor = torch.as_tensor(anchor)
    return factor(decompose(sum(grams), where="map.weight"), anchor, residual(anchor, weights, grams))


@settings(deadline=None, max_examples=25)
@given(seed=seeds, experts=st.integers(1, 4), log_lambda=st.floats(-4, 3))
def test_the_mean_solves_the_normal_equations(seed, experts, log_lambda):
    _, grams, weights, anchor = draw(seed, experts)
    lam = 10.0**log_lambda
    total = sum(grams)
    ridge = lam * np.trace(total) / IN
    right = sum(w @ g for w, g in zip(weights, grams, strict=True)) + ridge * anchor
    expected = np.linalg.solve(total + ridge * np.eye(IN), right.T).T
    found = posterior_of(grams, weights, anchor).mean(lam)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-8, atol=1e-8)


@settings(deadline=None, max_examples=25)
@given(seed=seeds, rows=st.integers(1, 20), log_lambda=st.floats(-3, 2))
def test_the_mean_is_ridge_regression_on_the_rows_themselves(seed, rows, log_lambda):
    X, grams, weights, anchor = draw(seed, experts=2, rows=rows)
    lam = 10.0**log_lambda
    ridge = lam * np.trace(sum(grams)) / IN
    # One least-squares problem: every expert's rows and answers, then the prior as rows of its own.
    inputs = np.vstack([x / math.sqrt(rows) for x in X] + [math.sqrt(ridge) * np.eye(IN)])
    answers = np.vstack(
        [x @ w.T / math.sqrt(rows) for x, w in zip(X, weights, strict=True)] + [math.sqrt(ridge) * anchor.T]
    )
    expected = np.linalg.lstsq(inputs, answers, rcond=None)[0].T
    found = posterior_of(grams, weights, anchor).mean(lam)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=10)
@given(seed=seeds)
def test_an_infinite_strength_is_the_anchor_bit_for_bit(seed):
    _, grams, weights, anchor = draw(seed)
    anchor = anchor.astype(np.float32)
    found = posterior_of(grams, weights, anchor).mean(math.inf)
    assert found.dtype == torch.float64
    assert np.array_equal(found.float().numpy(), anchor)


@settings(deadline=None, max_examples=10)
@given(seed=seeds)
def test_a_growing_strength_approaches_the_anchor(seed):
    _, grams, weights, anchor = draw(seed)
    posterior = posterior_of(grams, weights, anchor)
    distances = [float((posterior.mean(10.0**k) - torch.as_tensor(anchor)).norm()) for k in range(-3, 9)]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-6


@pytest.mark.parametrize("lam", [0.0, 1e-12, 1e-4])
@settings(deadline=None, max_examples=15)
@given(seed=seeds, rank=st.integers(1, IN - 1))
def test_directions_never_seen_keep_the_anchor(lam, seed, rank):
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.normal(size=(IN, IN)))
    X = [rng.normal(size=(30, rank)) @ basis[:, :rank].T for _ in range(2)]
    grams = [x.T @ x for x in X]
    _, _, weights, anchor = draw(seed, experts=2)
    found = posterior_of(grams, weights, anchor).mean(lam).numpy()
    unseen, seen = basis[:, rank:], basis[:, :rank]
    np.testing.assert_allclose(found @ unseen, anchor @ unseen, atol=1e-7)
    if lam == 0:
        inner = [seen.T @ g @ seen for g in grams]
        right = sum(w @ seen @ g for w, g in zip(weights, inner, strict=True))
        np.testing.assert_allclose(found @ seen, np.linalg.solve(sum(inner), right.T).T, atol=1e-7)


@settings(deadline=None, max_examples=10)
@given(seed=seeds)
def test_rounding_in_a_singular_gram_of_float32_products_is_not_blown_up(seed):
    rng = np.random.default_rng(seed)
    X = [(rng.normal(size=(10, 60)) * np.logspace(0, -2, 60) + 1).astype(np.float32) for _ in range(3)]
    grams = [x.T @ x for x in X]
    _, _, weights, anchor = draw(seed, inputs=60)
    found = posterior_of(grams, weights, anchor).mean(0.0).numpy()
    largest = max(np.linalg.norm(w - anchor, 2) for w in weights)
    assert np.linalg.norm(found - anchor, 2) < 1e3 * largest


def test_no_inputs_at_all_give_the_anchor():
    _, _, weights, anchor = draw(0)
    posterior = posterior_of([np.zeros((IN, IN))] * 3, weights, anchor)
    for lam in (0.0, 1.0, math.inf):
        assert np.array_equal(posterior.mean(lam).numpy(), anchor)
    assert posterior.condition(1.0) == math.inf
    assert posterior.condition(math.inf) == 1.0


@settings(deadline=None, max_examples=15)
@given(seed=seeds, lam=st.sampled_from([0.0, 1e-3, 1.0]))
def test_the_condition_is_that_of_the_matrix_solved(seed, lam):
    _, grams, weights, anchor = draw(seed)
    total = sum(grams)
    expected = np.linalg.cond(total + lam * np.trace(total) / IN * np.eye(IN))
    assert posterior_of(grams, weights, anchor).condition(lam) == pytest.approx(expected, rel=1e-6)


def test_a_singular_gram_has_no_finite_condition_until_the_prior_fills_it():
    _, _, weights, anchor = draw(0, experts=1)
    posterior = posterior_of([np.diag([1.0, 1, 1, 1, 1, RELATIVE_CUTOFF / 2])], weights, anchor)
    assert posterior.condition(0.0) == math.inf
    assert 1 < posterior.condition(0.1) < 20


@settings(deadline=None, max_examples=15)
@given(seed=seeds, order=st.permutations(range(3)), log_lambda=st.floats(-3, 2))
def test_the_order_of_the_experts_does_not_matter(seed, order, log_lambda):
    _, grams, weights, anchor = draw(seed)
    shuffled = posterior_of([grams[i] for i in order], [weights[i] for i in order], anchor)
    np.testing.assert_allclose(
        shuffled.mean(10.0**log_lambda),
        posterior_of(grams, weights, anchor).mean(10.0**log_lambda),
        atol=1e-9,
    )


@settings(deadline=None, max_examples=15)
@given(seed=seeds, scale=st.sampled_from([1e-6, 3.0, 1e8]))
def test_the_strength_is_relative_to_the_grams(seed, scale):
    _, grams, weights, anchor = draw(seed)
    scaled = posterior_of([scale * g for g in grams], weights, anchor).mean(0.1)
    np.testing.assert_allclose(scaled, posterior_of(grams, weights, anchor).mean(0.1), atol=1e-9)


@settings(deadline=None, max_examples=10)
@given(seed=seeds, log_lambda=st.floats(-4, 2))
def test_experts_that_equal_the_anchor_leave_it_alone(seed, log_lambda):
    _, grams, _, anchor = draw(seed)
    found = posterior_of(grams, [anchor] * 3, anchor).mean(10.0**log_lambda)
    assert np.array_equal(found.numpy(), anchor)


@settings(deadline=None, max_examples=10)
@given(seed=seeds)
def test_one_expert_without_a_prior_is_that_expert(seed):
    _, grams, weights, anchor = draw(seed, experts=1)
    np.testing.assert_allclose(posterior_of(grams, weights, anchor).mean(0.0), weights[0], atol=1e-6)


def test_low_precision_inputs_are_worked_on_in_float64():
    _, grams, weights, anchor = draw(3)
    grams = [torch.as_tensor(g).float() for g in grams]
    weights = [torch.as_tensor(w).bfloat16() for w in weights]
    anchor = torch.as_tensor(anchor).bfloat16()
    expected = posterior_of([g.double() for g in grams], [w.double() for w in weights], anchor.double())
    spectrum = decompose(sum(g.double() for g in grams), where="map.weight")
    found = factor(spectrum, anchor, residual(anchor, weights, grams)).mean(0.3)
    assert found.dtype == torch.float64
    assert torch.equal(found, expected.mean(0.3))


def test_the_same_inputs_give_the_same_bytes():
    first, second = (posterior_of(*draw(5)[1:]).mean(0.1).numpy().tobytes() for _ in range(2))
    assert first == second


def test_a_spectrum_rebuilds_its_gram():
    _, grams, _, _ = draw(2)
    spectrum = decompose(torch.as_tensor(sum(grams)).float(), where="map.weight")
    rebuilt = spectrum.eigenvectors * spectrum.eigenvalues @ spectrum.eigenvectors.T
    np.testing.assert_allclose(rebuilt, sum(grams), rtol=1e-5, atol=1e-5)
    assert spectrum.eigenvalues.dtype == torch.float64
    assert spectrum.eigenvalues.tolist() == sorted(spectrum.eigenvalues.tolist())
    assert spectrum.trace == pytest.approx(np.trace(sum(grams)), rel=1e-6)


def test_eigenvalues_below_zero_by_rounding_become_zero():
    row = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert decompose(torch.outer(row, row), where="map.weight").eigenvalues.min() >= 0


@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (torch.full((2, 2), float("nan")), "NaN"),
        (torch.tensor([[1.0, float("inf")], [float("inf"), 1.0]]), "NaN or infinite"),
        (torch.tensor([[1.0, 0.5], [0.4, 1.0]]), "not symmetric"),
        (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), "negative eigenvalue"),
        (torch.zeros(2, 3), "not square"),
        (torch.zeros(3), "not square"),
    ],
)
def test_what_is_not_a_gram_is_refused_by_name(gram, message):
    with pytest.raises(BMMError, match=rf"block\.0\.query.*{message}"):
        decompose(gram, where="block.0.query")


@pytest.mark.parametrize("lam", [-1.0, math.nan])
def test_an_impossible_strength_is_refused(lam):
    posterior = posterior_of(*draw(0)[1:])
    with pytest.raises(BMMError, match="prior strength"):
        posterior.mean(lam)
    with pytest.raises(BMMError, match="prior strength"):
        posterior.condition(lam)


def test_what_does_not_fit_together_is_refused():
    eye, weight = torch.eye(3), torch.zeros(2, 3)
    spectrum = decompose(eye, where="map.weight")
    with pytest.raises(BMMError, match="number of experts' weights differs"):
        residual(weight, [weight, weight], [eye])
    with pytest.raises(BMMError, match="do not fit an anchor"):
        residual(weight, [weight], [torch.eye(2)])
    with pytest.raises(BMMError, match="not fit a Gram matrix of size 3"):
        factor(spectrum, torch.zeros(2, 4), torch.zeros(2, 4))
    with pytest.raises(BMMError, match="NaN"):
        factor(spectrum, torch.full((2, 3), math.nan), weight)


@settings(deadline=None, max_examples=15)
@given(seed=seeds, gamma=st.floats(-1, 2))
def test_assembly_moves_along_the_line_from_the_base(seed, gamma):
    rng = np.random.default_rng(seed)
    base, mean = rng.normal(size=(2, OUT, IN))
    found = assemble(torch.as_tensor(base), torch.as_tensor(mean), gamma)
    np.testing.assert_allclose(found, (1 - gamma) * base + gamma * mean, atol=1e-12)


def test_assembly_at_one_is_the_mean_and_at_zero_the_base_bit_for_bit():
    base, mean = torch.randn(2, OUT, IN, generator=torch.Generator().manual_seed(0))
    assert torch.equal(assemble(base, mean.double(), 1.0), mean.double())
    assert torch.equal(assemble(base, mean.double(), 0.0), base.double())


def test_the_near_mean_is_the_mean_to_float32s_precision() -> None:
    torch.manual_seed(0)
    rows = torch.randn(400, 40, dtype=torch.float64) * torch.logspace(0, -3, 40, dtype=torch.float64)
    gram = rows.T @ rows
    anchor, pull = torch.randn(6, 40, dtype=torch.float64), torch.randn(6, 40, dtype=torch.float64) @ gram
    posterior = factor(decompose(gram, where="rows"), anchor, pull)
    for lam in (0.0, 1e-4, 0.1, 100.0):
        exact, near = posterior.mean(lam), posterior.near_mean(lam)
        assert near.dtype == torch.float32
        # The pull's error, and the rounding of the sum.
        allowed = 2e-6 * float((exact - anchor).norm()) + 1e-7 * float(exact.norm())
        assert float((near.double() - exact).norm()) < allowed, lam
    assert torch.equal(posterior.near_mean(float("inf")), anchor.float())
    with pytest.raises(BMMError):
        posterior.near_mean(-1.0)
