from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bmm.errors import BMMError
from bmm.regression.posterior import decompose, factor, residual
from bmm.regression.regmean import regmean, shrink

OUT, IN = 4, 6
seeds = st.integers(0, 2**31)


def draw(seed, experts=3, rows=40):
    rng = np.random.default_rng(seed)
    X = [
        rng.normal(size=(rows, IN)) @ np.linalg.qr(rng.normal(size=(IN, IN)))[0] * rng.uniform(0.5, 2, IN)
        for _ in range(experts)
    ]
    return [x.T @ x / rows for x in X], [rng.normal(size=(OUT, IN)) for _ in range(experts)], rng


def closed_form(grams, weights, alpha):
    """The published formula entry by entry: off-diagonal entries times alpha, then a bare solve."""
    shrunk = [np.where(np.eye(IN, dtype=bool), g, alpha * g) for g in grams]
    right = sum(w @ g for w, g in zip(weights, shrunk, strict=True))
    return np.linalg.solve(sum(shrunk), right.T).T


def tensors(arrays, dtype=torch.float64):
    return [torch.as_tensor(array).to(dtype) for array in arrays]


@settings(deadline=None, max_examples=25)
@given(seed=seeds, experts=st.integers(1, 4), alpha=st.floats(0, 1))
def test_it_matches_the_published_closed_form(seed, experts, alpha):
    grams, weights, _ = draw(seed, experts)
    found = regmean(tensors(weights), tensors(grams), alpha=alpha, where="map.weight")
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found, closed_form(grams, weights, alpha), rtol=1e-7, atol=1e-7)


def test_nine_tenths_of_the_off_diagonal_entries_are_kept_by_default():
    grams, weights, _ = draw(1)
    found = regmean(tensors(weights), tensors(grams), alpha=0.9, where="map.weight")
    np.testing.assert_allclose(found, closed_form(grams, weights, 0.9), atol=1e-9)


@settings(deadline=None, max_examples=25)
@given(seed=seeds, lam=st.sampled_from([0.0, 1e-12]))
def test_the_posterior_without_a_prior_is_regmean_whatever_the_anchor(seed, lam):
    grams, weights, rng = draw(seed)
    anchor = torch.as_tensor(10 * rng.normal(size=(OUT, IN)))
    posterior = factor(
        decompose(torch.as_tensor(sum(grams)), where="map.weight"),
        anchor,
        residual(anchor, tensors(weights), tensors(grams)),
    )
    expected = regmean(tensors(weights), tensors(grams), alpha=1.0, where="map.weight")
    np.testing.assert_allclose(posterior.mean(lam), expected, rtol=1e-7, atol=1e-7)


@settings(deadline=None, max_examples=10)
@given(seed=seeds)
def test_without_off_diagonals_it_is_a_weighted_mean_of_columns(seed):
    grams, weights, _ = draw(seed)
    diagonals = np.stack([np.diag(g) for g in grams])
    expected = sum(w * d for w, d in zip(weights, diagonals, strict=True)) / diagonals.sum(axis=0)
    np.testing.assert_allclose(
        regmean(tensors(weights), tensors(grams), alpha=0.0, where="map.weight"), expected, atol=1e-9
    )


@settings(deadline=None, max_examples=10)
@given(seed=seeds, order=st.permutations(range(3)), scale=st.sampled_from([1e-5, 1e6]))
def test_neither_the_order_nor_a_common_scale_matters(seed, order, scale):
    grams, weights, _ = draw(seed)
    shuffled = regmean(
        tensors([weights[i] for i in order]), tensors([scale * grams[i] for i in order]), alpha=0.9, where="map.weight"
    )
    expected = regmean(tensors(weights), tensors(grams), alpha=0.9, where="map.weight")
    np.testing.assert_allclose(shuffled, expected, atol=1e-8)


@pytest.mark.parametrize("alpha", [0.9, 1.0])
def test_inputs_that_never_came_keep_the_mean(alpha):
    grams, weights, _ = draw(4)
    for gram in grams:
        gram[-1], gram[:, -1] = 0, 0
    found = regmean(tensors(weights), tensors(grams), alpha=alpha, where="map.weight").numpy()
    np.testing.assert_allclose(found[:, -1], np.mean(weights, axis=0)[:, -1], atol=1e-9)
    inner = [gram[:-1, :-1] for gram in grams]
    shrunk = [alpha * g + (1 - alpha) * np.diag(np.diag(g)) for g in inner]
    right = sum(w[:, :-1] @ g for w, g in zip(weights, shrunk, strict=True))
    np.testing.assert_allclose(found[:, :-1], np.linalg.solve(sum(shrunk), right.T).T, atol=1e-8)


@settings(deadline=None, max_examples=25)
@given(seed=seeds, decades=st.floats(0, 9))
def test_with_and_without_eigenvalues_it_is_the_same(seed, decades):
    """A factorisation where each direction was seen well, an eigendecomposition where one may not have been."""
    rng = np.random.default_rng(seed)
    turned = np.linalg.qr(rng.normal(size=(IN, IN)))[0]
    gram = torch.as_tensor((turned * np.logspace(0, -decades, IN)) @ turned.T)
    weights = tensors([rng.normal(size=(OUT, IN)) for _ in range(2)])
    found = regmean(weights, [gram, gram], alpha=1.0, where="map.weight")
    mean = (weights[0] + weights[1]) / 2
    pull = residual(mean, weights, [gram, gram])
    exact = factor(decompose(gram + gram, where="map.weight"), mean, pull).mean(0.0)
    torch.testing.assert_close(found, exact, rtol=1e-8, atol=1e-8)
    assert decades < 7 or torch.equal(found, exact)


def test_maps_that_share_an_input_can_be_stacked():
    grams, weights, rng = draw(6)
    more = [rng.normal(size=(3, IN)) for _ in weights]
    stacked = regmean(
        tensors([np.vstack(pair) for pair in zip(weights, more, strict=True)]), tensors(grams), alpha=0.9, where="qkv"
    )
    apart = [regmean(tensors(part), tensors(grams), alpha=0.9, where="q") for part in (weights, more)]
    torch.testing.assert_close(stacked, torch.cat(apart))


def test_low_precision_inputs_are_worked_on_in_float64():
    grams, weights, _ = draw(3)
    half = tensors(weights, torch.bfloat16)
    single = tensors(grams, torch.float32)
    expected = closed_form([g.double().numpy() for g in single], [w.double().numpy() for w in half], 0.9)
    np.testing.assert_allclose(regmean(half, single, alpha=0.9, where="map.weight"), expected, atol=1e-9)


def test_shrinking_leaves_the_diagonal_alone():
    gram = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    assert shrink(gram, 0.5).tolist() == [[2.0, 0.5], [0.5, 3.0]]


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_an_impossible_share_is_refused(alpha):
    with pytest.raises(BMMError, match="between 0 and 1"):
        shrink(torch.eye(2), alpha)


def test_what_cannot_be_merged_is_named():
    eye, weight = torch.eye(3), torch.ones(2, 3)
    with pytest.raises(BMMError, match=r"map\.weight"):
        regmean([], [], alpha=0.9, where="map.weight")
    with pytest.raises(BMMError, match=r"map\.weight holds NaN"):
        regmean([weight * float("nan")], [eye], alpha=0.9, where="map.weight")
    with pytest.raises(BMMError, match=r"map\.weight differs in shape"):
        regmean([weight, torch.ones(3, 3)], [eye, eye], alpha=0.9, where="map.weight")
    with pytest.raises(BMMError, match=r"Gram matrix of map\.weight holds NaN"):
        regmean([weight], [torch.full((3, 3), float("nan"))], alpha=0.9, where="map.weight")
    with pytest.raises(BMMError, match="number of experts' weights"):
        regmean([weight, weight], [eye], alpha=0.9, where="map.weight")
