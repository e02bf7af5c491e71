from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bmm.anchors.isotropic import IsoC, IsoCTS, common_and_specific, isotropic
from bmm.anchors.settings import IsoCSettings, IsoCTSSettings
from bmm.anchors.task_vectors import TaskVectors


def random_matrix(seed, rows, columns):
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 8), columns=st.integers(1, 8))
def test_every_direction_gets_the_mean_of_the_singular_values(seed, rows, columns):
    matrix = random_matrix(seed, rows, columns)
    values = torch.linalg.svdvals(matrix)
    found = isotropic(matrix)
    torch.testing.assert_close(torch.linalg.svdvals(found), values.mean().expand_as(values))
    # The trace norm and the directions stay: UᵀMV is still diagonal and positive.
    assert float(torch.trace(found.T @ matrix)) == pytest.approx(float(values.mean() * values.sum()))


def test_an_isotropic_matrix_stays_as_it_is():
    Q, _ = torch.linalg.qr(random_matrix(0, 9, 5))
    torch.testing.assert_close(isotropic(3 * Q), 3 * Q)


def test_directions_that_the_sum_does_not_span_stay_empty():
    matrix = random_matrix(0, 8, 2) @ random_matrix(1, 2, 6)
    found = isotropic(matrix)
    assert torch.linalg.matrix_rank(found) == 2
    torch.testing.assert_close(torch.linalg.svdvals(found)[0], torch.linalg.svdvals(matrix).sum() / 6)


def published(vectors, fraction):
    """Return Iso-CTS by the formula of its paper, in numpy, for task vectors of full rank."""
    tasks, bound = len(vectors), min(vectors[0].shape)
    common = int(bound * fraction)
    specific = round((bound - common) / tasks)
    common = bound - specific * tasks
    U, S, Vt = np.linalg.svd(sum(vectors), full_matrices=False)
    left, values, right = [U[:, :common]], [S[:common]], [Vt[:common]]
    for vector in vectors:
        own = np.linalg.svd(vector - U[:, :common] @ U[:, :common].T @ vector, full_matrices=False)
        left.append(own[0][:, :specific])
        values.append(own[1][:specific])
        right.append(own[2][:specific])

    def polar(matrix):
        A, _, B = np.linalg.svd(matrix, full_matrices=False)
        return A @ B

    return np.concatenate(values).mean() * polar(np.hstack(left)) @ polar(np.vstack(right))


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 2**31),
    experts=st.integers(1, 4),
    fraction=st.sampled_from([0.5, 0.8, 1.0]),
    shape=st.sampled_from([(8, 8), (10, 6), (7, 12)]),
)
def test_iso_cts_is_the_published_formula(random_weights, task_vectors_of, seed, experts, fraction, shape):
    weights = random_weights(seed, experts=experts, shapes={"map.weight": shape})
    expected = published(task_vectors_of(weights, "map.weight"), fraction)
    found = common_and_specific(TaskVectors("map.weight", weights), fraction)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("experts", [1, 3])
def test_iso_cts_without_specific_directions_or_other_tasks_is_iso_c(experts, random_weights):
    weights = random_weights(experts=experts)
    fraction = 0.5 if experts == 1 else 1.0
    expected = IsoC(IsoCSettings()).merge("map.weight", weights)
    found = IsoCTS(IsoCTSSettings(common=fraction)).merge("map.weight", weights)
    torch.testing.assert_close(found.tensor, expected.tensor)


def test_identical_experts_have_nothing_specific_and_share_their_directions(random_weights, weights_of):
    one = random_weights(experts=1)
    vector = one.experts[0]["map.weight"].double() - one.bases["map.weight"].double()
    twice = weights_of(one.bases, one.experts * 2)
    found = IsoC(IsoCSettings()).merge("map.weight", twice).tensor.double() - one.bases["map.weight"].double()
    torch.testing.assert_close(found, 2 * isotropic(vector), rtol=1e-4, atol=1e-6)
    # Half of the directions are common, at twice the strength; the two tasks bring the same rest, once.
    vectors = TaskVectors("map.weight", twice)
    direction = common_and_specific(vectors, 0.5)
    assert direction.isfinite().all()
    S = torch.linalg.svdvals(direction)
    assert torch.allclose(S[S > 1e-9], S[0])


def test_tasks_on_orthogonal_directions_are_all_kept(weights_of):
    experts = []
    for index in range(3):
        vector = torch.zeros(6, 6)
        vector[2 * index, 2 * index], vector[2 * index + 1, 2 * index + 1] = 3.0, 1.0
        experts.append({"map.weight": vector})
    weights = weights_of({"map.weight": torch.zeros(6, 6)}, experts)
    for method in (IsoC(IsoCSettings()), IsoCTS(IsoCTSSettings(common=0.5))):
        torch.testing.assert_close(method.merge("map.weight", weights).tensor, 2 * torch.eye(6))


def test_an_expert_that_left_a_map_alone_does_not_count(random_weights):
    weights = random_weights(experts=3)
    weights.experts[1] = dict(weights.bases)
    without = type(weights)(weights.bases, [weights.experts[0], weights.experts[2]])
    found, expected = (common_and_specific(TaskVectors("map.weight", w), 0.8) for w in (weights, without))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("common", [0.0, 0.1])
def test_rounding_never_asks_for_more_directions_than_there_are(common, random_weights):
    weights = random_weights(experts=2, shapes={"map.weight": (7, 9)})
    found = common_and_specific(TaskVectors("map.weight", weights), common)
    assert found.isfinite().all()
    assert torch.linalg.matrix_rank(found) <= 7


@pytest.mark.parametrize("method", [IsoC, IsoCTS])
def test_the_scale_multiplies_the_whole_update(method, random_weights):
    weights = random_weights()
    settings_type = IsoCSettings if method is IsoC else IsoCTSSettings
    for name in ("map.weight", "map.bias"):
        base = weights.base(name).double()
        one, half = (method(settings_type(scale=scale)).merge(name, weights).tensor - base for scale in (1.0, 0.5))
        torch.testing.assert_close(half, one / 2, rtol=1e-4, atol=1e-6)
