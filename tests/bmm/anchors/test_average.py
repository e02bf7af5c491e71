from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from bmm.anchors.average import Average
from bmm.anchors.settings import AverageSettings


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31), experts=st.integers(1, 5))
def test_it_is_the_mean_of_the_weights(random_weights, seed, experts):
    weights = random_weights(seed, experts)
    for name in weights.names():
        mean = np.mean([expert[name].double().numpy() for expert in weights.experts], axis=0)
        merged = Average(AverageSettings()).merge(name, weights).tensor
        np.testing.assert_allclose(merged.numpy(), mean, rtol=1e-6, atol=1e-7)


def test_an_expert_equal_to_the_base_still_counts(random_weights):
    weights = random_weights(experts=2)
    weights.experts[1] = dict(weights.bases)
    merged = Average(AverageSettings()).merge("map.bias", weights).tensor
    halfway = (weights.bases["map.bias"].double() + weights.experts[0]["map.bias"].double()) / 2
    np.testing.assert_allclose(merged.numpy(), halfway.numpy(), rtol=1e-6)
