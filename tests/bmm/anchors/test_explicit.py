from __future__ import annotations

import pytest
import torch

from bmm.anchors.interface import Sources
from bmm.anchors.registry import build
from bmm.anchors.settings import CheckpointAnchorSettings
from bmm.errors import CheckpointError

SETTINGS = CheckpointAnchorSettings(path="models/other")


def test_it_takes_the_checkpoint_as_it_is(random_weights):
    weights, other = random_weights(0), random_weights(1, dtype=torch.bfloat16).bases
    anchor = build(SETTINGS, Sources(checkpoint=other.__getitem__))
    anchor.prepare(weights)
    for name in weights.names():
        merged = anchor.merge(name, weights)
        assert torch.equal(merged.tensor, other[name].float())
        assert merged.treatment == "anchored"


def test_integers_come_from_the_base(random_weights):
    weights = random_weights()
    weights.bases["steps"] = torch.tensor([3])
    merged = build(SETTINGS, Sources(checkpoint={"steps": torch.tensor([9])}.__getitem__)).merge("steps", weights)
    assert merged.tensor.tolist() == [3]
    assert merged.treatment == "copied"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, r"models/other has no tensor 'map\.bias'"),
        ({"map.bias": torch.zeros(5)}, r"'map\.bias' of the anchor checkpoint models/other has shape \(5,\)"),
        ({"map.bias": torch.full((6,), float("nan"))}, r"'map\.bias' of .* NaN"),
        ({"map.bias": torch.zeros(6, dtype=torch.int64)}, r"'map\.bias' of .* torch\.int64"),
    ],
)
def test_a_tensor_that_cannot_be_used_is_named(tensors, message, random_weights):
    with pytest.raises(CheckpointError, match=message):
        build(SETTINGS, Sources(checkpoint=tensors.__getitem__)).merge("map.bias", random_weights())
