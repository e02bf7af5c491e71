from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bmm.anchors.settings import TSVSettings
from bmm.anchors.tsv import TSV, polar_factor


def reference(vectors, scale=1.0):
    """The published formula, its polar factors from scipy instead of an SVD of ours."""
    share = min(vectors[0].shape) // len(vectors)
    left, values, right = [], [], []
    for vector in vectors:
        U, S, Vh = np.linalg.svd(vector, full_matrices=False)
        left.append(U[:, :share])
        values.extend(S[:share])
        right.append(Vh[:share].T)
    unitary_left, _ = scipy.linalg.polar(np.hstack(left))
    unitary_right, _ = scipy.linalg.polar(np.hstack(right))
    return scale * unitary_left @ np.diag(values) @ unitary_right.T


@pytest.mark.parametrize(("out", "inputs"), [(12, 12), (8, 20), (20, 8)])
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**31), experts=st.integers(1, 4), scale=st.sampled_from([0.5, 1.0]))
def test_it_matches_the_published_formula(out, inputs, random_weights, task_vectors_of, seed, experts, scale):
    weights = random_weights(seed, experts, shapes={"map.weight": (out, inputs)})
    vectors = task_vectors_of(weights, "map.weight")
    merged = TSV(TSVSettings(scale=scale)).merge("map.weight", weights)
    expected = weights.bases["map.weight"].double().numpy() + reference(vectors, scale)
    np.testing.assert_allclose(merged.tensor.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_what_is_not_a_linear_map_is_averaged(random_weights, task_vectors_of):
    weights = random_weights()
    for name in ("map.bias", "embedding.weight"):
        expected = weights.bases[name].double().numpy() + np.mean(task_vectors_of(weights, name), axis=0)
        merged = TSV(TSVSettings()).merge(name, weights)
        np.testing.assert_allclose(merged.tensor.numpy(), expected, rtol=1e-6, atol=1e-7)
        assert merged.treatment == "averaged"


def test_experts_on_orthogonal_directions_all_survive_whole(weights_of):
    vectors = [torch.zeros(6, 6) for _ in range(3)]
    for index, vector in enumerate(vectors):
        vector[2 * index, 2 * index], vector[2 * index + 1, 2 * index + 1] = 3.0 + index, 1.0
    base = {"map.weight": torch.zeros(6, 6)}
    weights = weights_of(base, [{"map.weight": vector} for vector in vectors])
    merged = TSV(TSVSettings()).merge("map.weight", weights).tensor
    torch.testing.assert_close(merged, sum(vectors))


def test_identical_experts_keep_their_leading_part(random_weights, weights_of):
    weights = random_weights(experts=1, shapes={"map.weight": (8, 8)})
    vector = weights.experts[0]["map.weight"].double() - weights.bases["map.weight"].double()
    U, S, Vh = np.linalg.svd(vector.numpy())
    merged = TSV(TSVSettings()).merge("map.weight", weights_of(weights.bases, weights.experts * 2)).tensor
    expected = weights.bases["map.weight"].double().numpy() + (U[:, :4] * S[:4]) @ Vh[:4]
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_an_expert_that_left_a_map_alone_claims_no_share(random_weights):
    weights = random_weights(experts=2)
    weights.experts[1] = dict(weights.bases)
    merged = TSV(TSVSettings()).merge("map.weight", weights).tensor
    torch.testing.assert_close(merged, weights.experts[0]["map.weight"])


def test_low_rank_experts_bring_only_their_own_directions(random_weights, weights_of):
    draws = random_weights(shapes={f"{side}{index}": (10, 2) for side in "ab" for index in range(2)}).bases
    vectors = [draws[f"a{index}"] @ draws[f"b{index}"].T for index in range(2)]
    weights = weights_of({"map.weight": torch.zeros(10, 10)}, [{"map.weight": vector} for vector in vectors])
    merged = TSV(TSVSettings()).merge("map.weight", weights).tensor
    assert torch.linalg.matrix_rank(merged, rtol=1e-5) == 4
    span = torch.cat([draws["b0"], draws["b1"]], dim=1)
    outside = merged - merged @ span @ torch.linalg.pinv(span)
    assert outside.abs().max() < 1e-4 * merged.abs().max()


def test_more_experts_than_the_rank_allows(random_weights):
    weights = random_weights(experts=7, shapes={"map.weight": (3, 5)})
    merged = TSV(TSVSettings()).merge("map.weight", weights)
    assert merged.tensor.isfinite().all()
    assert not torch.equal(merged.tensor, weights.bases["map.weight"])


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 8), columns=st.integers(1, 8))
def test_the_polar_factor_has_orthonormal_columns_or_rows(seed, rows, columns):
    matrix = torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    factor = polar_factor(matrix)
    product = factor.T @ factor if rows >= columns else factor @ factor.T
    torch.testing.assert_close(product, torch.eye(min(rows, columns), dtype=torch.float64))
