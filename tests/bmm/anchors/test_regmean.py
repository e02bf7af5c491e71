from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bmm.anchors.regmean import RegMean
from bmm.anchors.settings import RegMeanSettings


def grams_of(weights, seed, rows=40):
    generator = torch.Generator().manual_seed(seed)

    def gram(index, name):
        generator.manual_seed(seed + 1000 * index + len(name))
        X = torch.randn(rows, weights.bases[name].shape[1], generator=generator, dtype=torch.float64)
        return X.T @ X / rows

    return gram


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**31), kept=st.sampled_from([0.0, 0.5, 0.9, 1.0]))
def test_linear_maps_are_the_closed_form_on_the_whole_weights(random_weights, seed, kept):
    weights = random_weights(seed)
    gram = grams_of(weights, seed)
    anchor = RegMean(RegMeanSettings(off_diagonal=kept), gram)
    for name in ("map.weight", "tall.weight"):
        grams = [gram(index, name) for index in range(weights.count)]
        shrunk = [kept * own + (1 - kept) * own.diagonal().diag() for own in grams]
        target = sum(e[name].double() @ own for e, own in zip(weights.experts, shrunk, strict=True))
        merged = anchor.merge(name, weights)
        torch.testing.assert_close(merged.tensor.double(), target @ sum(shrunk).inverse(), rtol=1e-5, atol=1e-6)
        assert merged.treatment == "anchored"


@pytest.mark.parametrize("name", ["map.bias", "embedding.weight"])
def test_the_rest_is_averaged_without_a_gram_matrix(name, random_weights):
    weights = random_weights()

    def none(index, name):
        raise KeyError(name)

    merged = RegMean(RegMeanSettings(), none).merge(name, weights)
    torch.testing.assert_close(merged.tensor, torch.stack([e[name] for e in weights.experts]).mean(0))
    assert merged.treatment == "averaged"


def test_an_expert_that_left_a_map_alone_counts_with_its_inputs(random_weights):
    weights = random_weights(experts=2)
    weights.experts[1]["map.weight"] = weights.bases["map.weight"].clone()
    size = weights.bases["map.weight"].shape[1]
    scales = (1.0, 3.0)
    anchor = RegMean(RegMeanSettings(), lambda index, _: scales[index] * torch.eye(size, dtype=torch.float64))
    expected = (weights.experts[0]["map.weight"] + 3 * weights.bases["map.weight"]) / 4
    torch.testing.assert_close(anchor.merge("map.weight", weights).tensor, expected)
