from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bmm.anchors.fisher import Fisher
from bmm.anchors.settings import FisherSettings
from bmm.errors import BMMError


def merge(weights, fishers, **said):
    anchor = Fisher(FisherSettings(**said), lambda index, name: fishers[index][name])
    anchor.prepare(weights)
    return {name: anchor.merge(name, weights).tensor for name in weights.names()}


def draw(weights, seed):
    generator = torch.Generator().manual_seed(seed)
    return [
        {name: torch.rand(tensor.shape, generator=generator) for name, tensor in weights.bases.items()}
        for _ in weights.experts
    ]


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**31), normalize=st.booleans(), floor=st.sampled_from([1e-6, 0.5]))
def test_every_entry_is_the_weighted_mean_of_the_experts(random_weights, seed, normalize, floor):
    weights = random_weights(seed)
    fishers = draw(weights, seed)
    found = merge(weights, fishers, normalize=normalize, floor=floor)
    norms = [torch.cat([tensor.double().flatten() for tensor in one.values()]).norm() for one in fishers]
    for name, tensor in found.items():
        own = [one[name].double() + floor for one in fishers]
        if normalize:
            own = [value / (norm + floor) for value, norm in zip(own, norms, strict=True)]
        experts = [expert[name].double() for expert in weights.experts]
        expected = sum(f * e for f, e in zip(own, experts, strict=True)) / sum(own)
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-6)


def test_equal_information_is_the_mean_and_so_is_none(random_weights):
    weights = random_weights()
    for value in (0.0, 3.0):
        fishers = [{name: torch.full_like(tensor, value) for name, tensor in weights.bases.items()}] * 3
        for name, tensor in merge(weights, fishers).items():
            mean = torch.stack([expert[name] for expert in weights.experts]).mean(0)
            torch.testing.assert_close(tensor, mean, rtol=1e-5, atol=1e-6)


def test_an_entry_that_only_one_expert_uses_is_that_experts(random_weights):
    weights = random_weights()
    fishers = [{name: torch.zeros_like(tensor) for name, tensor in weights.bases.items()} for _ in range(3)]
    for index, name in enumerate(("map.weight", "tall.weight", "map.bias")):
        fishers[index][name].fill_(1.0)
    found = merge(weights, fishers, floor=1e-9)
    for index, name in enumerate(("map.weight", "tall.weight", "map.bias")):
        torch.testing.assert_close(found[name], weights.experts[index][name], rtol=1e-5, atol=1e-5)


def test_large_gradients_everywhere_win_nothing_when_normalised(random_weights):
    weights = random_weights()
    fishers = draw(weights, 0)
    louder = [{name: 1000 * tensor for name, tensor in fishers[0].items()}, *fishers[1:]]
    for name, tensor in merge(weights, louder, floor=1e-12).items():
        torch.testing.assert_close(tensor, merge(weights, fishers, floor=1e-12)[name], rtol=1e-5, atol=1e-6)
    loud = merge(weights, louder, floor=1e-12, normalize=False)["map.weight"]
    assert (loud - weights.experts[0]["map.weight"]).abs().mean() < 1e-3


def test_what_cannot_be_merged_is_refused(random_weights):
    weights = random_weights()
    fishers = draw(weights, 0)
    with pytest.raises(BMMError, match="before prepare"):
        Fisher(FisherSettings(), lambda index, name: fishers[index][name]).merge("map.weight", weights)
    fishers[1]["map.weight"][0, 0] = float("nan")
    with pytest.raises(BMMError, match=r"'map\.weight' is not finite"):
        merge(weights, fishers)
    fishers[1]["map.weight"] = torch.ones(2, 2)
    with pytest.raises(BMMError, match="another shape"):
        merge(weights, fishers)
