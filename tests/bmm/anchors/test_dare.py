from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bmm.anchors.dare import DARE, Thinned
from bmm.anchors.settings import DARESettings, TaskArithmeticSettings, TIESSettings
from bmm.anchors.task_arithmetic import TaskArithmetic
from bmm.anchors.ties import TIES

BIG = {"big.weight": (200, 300)}


def merge(anchor, weights):
    anchor.prepare(weights)
    return {name: anchor.merge(name, weights).tensor for name in weights.names()}


@pytest.mark.parametrize("drop", [0.0, 0.5, 0.9])
def test_an_entry_is_dropped_with_the_given_probability_and_the_rest_rescaled(drop, random_weights, task_vectors_of):
    weights = random_weights(experts=1, shapes=BIG, dtype=torch.float64)
    thin = Thinned(weights, drop, seed=1).expert(0, "big.weight") - weights.bases["big.weight"]
    vector = torch.from_numpy(task_vectors_of(weights, "big.weight")[0])
    kept = thin != 0
    # Five standard deviations of the share of 60,000 draws.
    assert abs(float(kept.double().mean()) - (1 - drop)) <= 5 * (drop * (1 - drop) / kept.numel()) ** 0.5
    torch.testing.assert_close(thin[kept], vector[kept] / (1 - drop), rtol=1e-9, atol=1e-13)


def test_the_mean_over_seeds_is_the_task_vector(random_weights, task_vectors_of):
    weights = random_weights(experts=1, dtype=torch.float64)
    vector = torch.from_numpy(task_vectors_of(weights, "map.weight")[0])
    seeds = 4000
    total = sum(Thinned(weights, 0.5, seed).mask(0, "map.weight", vector.shape).double() for seed in range(seeds))
    # Each entry survives in half of the draws: five standard deviations.
    assert (total / seeds - 0.5).abs().max() < 5 * 0.5 / seeds**0.5


@pytest.mark.parametrize("then", ["ta", "ties"])
@settings(deadline=None, max_examples=5)
@given(seed=st.integers(0, 2**31))
def test_what_follows_is_that_method_on_the_thinned_experts(then, random_weights, weights_of, seed):
    weights = random_weights(seed)
    thinned = Thinned(weights, 0.4, seed)
    experts = [{name: thinned.expert(index, name) for name in weights.names()} for index in range(weights.count)]
    materialised = weights_of({name: tensor.double() for name, tensor in weights.bases.items()}, experts)
    inner = TaskArithmetic(TaskArithmeticSettings()) if then == "ta" else TIES(TIESSettings(density=0.5))
    expected = merge(inner, materialised)
    found = merge(DARE(DARESettings(drop=0.4, seed=seed, then=then, density=0.5)), weights)
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name])


def test_seeds_experts_and_names_have_masks_of_their_own(random_weights, weights_of):
    shape = torch.Size((50, 50))
    thinned, other = (Thinned(random_weights(), 0.5, seed) for seed in (0, 1))
    mask = thinned.mask(0, "map.weight", shape)
    assert torch.equal(mask, thinned.mask(0, "map.weight", shape))
    for different in (
        thinned.mask(1, "map.weight", shape),
        thinned.mask(0, "tall.weight", shape),
        other.mask(0, "map.weight", shape),
    ):
        # Independent masks agree on about half of the entries: five standard deviations of 2,500 draws.
        assert abs(float((mask == different).double().mean()) - 0.5) < 5 * 0.5 / 50


def test_the_scale_defaults_to_that_of_the_method_that_follows():
    assert DARE(DARESettings()).scale == 0.3
    assert DARE(DARESettings(then="ties")).scale == 1.0
    assert DARE(DARESettings(then="ties", scale=0.7)).scale == 0.7
