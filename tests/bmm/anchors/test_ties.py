from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bmm.anchors.settings import TIESSettings
from bmm.anchors.ties import TIES, global_thresholds, tensor_threshold
from bmm.errors import BMMError


def naive(vectors, kept, combine, scale):
    """One entry at a time, with the thresholds taken from sorted lists."""
    flat = [vector.ravel() for vector in vectors]
    result = np.zeros_like(flat[0])
    for entry in range(result.size):
        values = [
            values[entry] if abs(np.float32(values[entry])) >= threshold else 0.0
            for values, threshold in zip(flat, kept, strict=True)
        ]
        positive = [value for value in values if value > 0]
        negative = [value for value in values if value < 0]
        agreeing = positive if sum(values) > 0 else negative if sum(values) < 0 else []
        if agreeing:
            result[entry] = scale * (sum(agreeing) / len(agreeing) if combine == "mean" else sum(agreeing))
    return result.reshape(vectors[0].shape)


def sorted_threshold(vector, density):
    magnitudes = sorted(np.abs(vector).astype(np.float32).ravel(), reverse=True)
    return magnitudes[max(1, round(density * len(magnitudes))) - 1]


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize(("combine", "scale"), [("mean", 1.0), ("sum", 0.3)])
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**31), density=st.floats(0.01, 1.0), experts=st.integers(1, 4))
def test_it_matches_a_naive_loop(scope, combine, scale, random_weights, task_vectors_of, seed, density, experts):
    weights = random_weights(seed, experts)
    anchor = TIES(TIESSettings(density=density, scope=scope, combine=combine))
    anchor.prepare(weights)
    whole = zip(*(task_vectors_of(weights, name) for name in weights.names()), strict=True)
    globally = [sorted_threshold(np.concatenate([part.ravel() for part in parts]), density) for parts in whole]
    for name in weights.names():
        vectors = task_vectors_of(weights, name)
        kept = globally if scope == "global" else [sorted_threshold(vector, density) for vector in vectors]
        expected = weights.bases[name].double().numpy() + naive(vectors, kept, combine, scale)
        np.testing.assert_allclose(anchor.merge(name, weights).tensor.numpy(), expected, rtol=1e-6, atol=1e-7)


@settings(deadline=None, max_examples=25)
@given(
    values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=2, max_size=60),
    density=st.floats(0.01, 1.0),
    cut=st.integers(0, 60),
)
def test_the_global_threshold_is_exact_for_any_numbers(weights_of, values, density, cut):
    # Zero base, so that the task vector is these very numbers, ties and subnormals included.
    parts = {"a": torch.tensor(values[:cut]), "b": torch.tensor(values[cut:])}
    weights = weights_of({name: torch.zeros_like(part) for name, part in parts.items()}, [parts])
    expected = sorted_threshold(np.array(values), density)
    assert global_thresholds(weights, density) == (expected,)
    assert tensor_threshold(torch.tensor(values, dtype=torch.float64), density) == expected


def test_the_global_scope_keeps_nothing_of_a_tensor_that_hardly_moved(weights_of):
    base = {"moved": torch.zeros(10), "still": torch.zeros(10)}
    expert = {"moved": torch.linspace(1, 2, 10), "still": torch.full((10,), 1e-3)}
    weights = weights_of(base, [expert, expert])
    anchor = TIES(TIESSettings(density=0.5))
    anchor.prepare(weights)
    assert torch.equal(anchor.merge("still", weights).tensor, torch.zeros(10))
    assert torch.equal(anchor.merge("moved", weights).tensor, expert["moved"])


def test_opposite_entries_of_equal_size_cancel(weights_of):
    weights = weights_of({"a": torch.ones(3)}, [{"a": torch.tensor([2.0, 2, 2])}, {"a": torch.tensor([0.0, 2, 3])}])
    anchor = TIES(TIESSettings(density=1.0))
    anchor.prepare(weights)
    assert anchor.merge("a", weights).tensor.tolist() == [1.0, 2.0, 2.5]


def test_a_given_scale_wins_over_the_default(random_weights):
    weights = random_weights()
    small, large = (TIES(TIESSettings(scope="tensor", scale=scale)) for scale in (0.5, 1.0))
    base = weights.bases["map.weight"]
    torch.testing.assert_close(
        2 * (small.merge("map.weight", weights).tensor - base),
        large.merge("map.weight", weights).tensor - base,
    )


def test_merging_before_preparing_is_refused(random_weights):
    with pytest.raises(BMMError, match="before prepare"):
        TIES(TIESSettings()).merge("map.weight", random_weights())


def test_preparing_twice_forgets_the_first_weights(random_weights):
    first, second = random_weights(1), random_weights(2)
    anchor, fresh = TIES(TIESSettings()), TIES(TIESSettings())
    anchor.prepare(first)
    anchor.prepare(second)
    fresh.prepare(second)
    assert torch.equal(anchor.merge("map.weight", second).tensor, fresh.merge("map.weight", second).tensor)
