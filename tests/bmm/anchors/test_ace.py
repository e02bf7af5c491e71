from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bmm.anchors.ace import ACE, heterogeneous
from bmm.anchors.settings import ACESettings
from bmm.anchors.task_vectors import TaskVectors


def published(vectors, *, ridge=1e-2, threshold=0.3, spectrum=0.3):
    """Return ACE-Merging's update of one matrix in numpy, step by step as its authors' code takes them."""
    energies = np.array([np.sum(vector**2) for vector in vectors])
    logs = np.log(energies + 1e-12)
    apart = len(vectors) > 1 and logs.var(ddof=1) / (logs.mean() ** 2 + 1e-12) > threshold
    size = vectors[0].shape[1]
    covariances, left, right = [], np.zeros((size, size)), np.zeros_like(vectors[0])
    for vector in vectors:
        centred = vector - vector.mean(axis=0, keepdims=True)
        covariance = centred.T @ centred
        trace = np.trace(covariance) + 1e-12 if apart else 1.0
        covariances.append(covariance / trace)
        ridged = covariance / trace + ridge / trace * np.eye(size)
        left += ridged
        right += centred @ ridged
    prior = sum(covariances).mean(axis=0, keepdims=True)
    if apart:
        prior = prior / (energies.mean() + 1e-12)
    merged = right @ np.linalg.inv(left + prior)
    if apart:
        fused = merged + sum(v @ (c - left / len(vectors)) for v, c in zip(vectors, covariances, strict=True))
        U, S, Vt = np.linalg.svd(fused, full_matrices=False)
        k = int(len(S) * spectrum)
        merged = merged + S[:k].mean() * U[:, :k] @ Vt[:k]
    return merged, apart


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 2**31),
    sizes=st.lists(st.sampled_from([0.003, 0.05, 1.0]), min_size=2, max_size=4),
    shape=st.sampled_from([(6, 9), (9, 4), (8, 8)]),
)
def test_it_is_the_published_procedure_on_either_side_of_the_threshold(
    random_weights, weights_of, task_vectors_of, seed, sizes, shape
):
    draws = [random_weights(seed + i, experts=1, shapes={"map.weight": shape}, size=s) for i, s in enumerate(sizes)]
    base = {"map.weight": torch.zeros(shape)}
    experts = [{"map.weight": one.experts[0]["map.weight"] - one.bases["map.weight"]} for one in draws]
    weights = weights_of(base, experts)
    expected, _ = published(task_vectors_of(weights, "map.weight"))
    found = ACE(ACESettings()).combine(TaskVectors("map.weight", weights))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


def test_both_branches_are_reached(random_weights, task_vectors_of):
    one = random_weights(experts=3)
    vectors = task_vectors_of(one, "map.weight")
    assert not published(vectors)[1]
    assert published([vectors[0], 100 * vectors[1], 0.1 * vectors[2]])[1]


def test_tasks_of_one_size_are_alike():
    assert not heterogeneous(torch.full((4,), 0.3, dtype=torch.float64), 0.0)
    assert not heterogeneous(torch.tensor([5.0], dtype=torch.float64), 0.0)
    assert heterogeneous(torch.tensor([1e-3, 1.0, 1e3], dtype=torch.float64), 0.3)


def test_an_expert_that_left_a_map_alone_does_not_count(random_weights):
    weights = random_weights(experts=3)
    weights.experts[1] = dict(weights.bases)
    without = type(weights)(weights.bases, [weights.experts[0], weights.experts[2]])
    found, expected = (ACE(ACESettings()).merge("map.weight", one).tensor for one in (weights, without))
    torch.testing.assert_close(found, expected)


def test_a_map_with_few_directions_is_corrected_all_the_same(random_weights):
    weights = random_weights(experts=2, shapes={"map.weight": (2, 5)})
    weights.experts[1]["map.weight"] = weights.bases["map.weight"] + 1e3
    assert ACE(ACESettings(threshold=0.0)).merge("map.weight", weights).tensor.isfinite().all()


@pytest.mark.parametrize("name", ["map.weight", "map.bias"])
def test_the_scale_multiplies_the_whole_update(name, random_weights):
    weights = random_weights()
    base = weights.base(name).double()
    one, half = (ACE(ACESettings(scale=scale)).merge(name, weights).tensor - base for scale in (1.0, 0.5))
    torch.testing.assert_close(half, one / 2, rtol=1e-4, atol=1e-6)
