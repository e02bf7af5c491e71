from __future__ import annotations

import pytest
import torch
from pydantic import TypeAdapter

from bmm.anchors.pieces import ENTRIES, merge_tensor
from bmm.anchors.registry import build
from bmm.anchors.settings import AnchorSettings
from bmm.errors import CheckpointError

SIZE = (ENTRIES // 64 + 3, 100)


@pytest.fixture
def large(weights_of):
    torch.manual_seed(0)
    base = {"table": torch.randn(SIZE).to(torch.bfloat16), "same": torch.randn(SIZE), "bias": torch.randn(5)}
    experts = [
        {
            "table": base["table"] + (0.1 * torch.randn(SIZE)).to(torch.bfloat16),
            "same": base["same"].clone(),
            "bias": base["bias"] + 1,
        }
        for _ in range(3)
    ]
    return weights_of(base, experts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "said",
    [
        {"method": "average"},
        {"method": "ta", "scale": 0.3},
        {"method": "ties", "scope": "tensor", "density": 0.2},
        {"method": "ties", "scope": "global", "combine": "sum"},
        {"method": "dare", "drop": 0.5},
        {"method": "tsv"},
    ],
)
def test_pieces_give_what_the_whole_gives(large, said, dtype) -> None:
    method = build(TypeAdapter(AnchorSettings).validate_python(said))
    method.prepare(large)
    for name in large.names():
        whole = method.merge(name, large)
        tensor, treatment = merge_tensor(method, name, large, dtype)
        assert torch.equal(tensor, whole.tensor.to(dtype)), name
        assert treatment == whole.treatment, name


def test_pieces_that_equal_the_base_do_not_make_the_tensor_copied(large) -> None:
    for expert in large.experts:
        expert["same"][-1] += 1
    method = build(TypeAdapter(AnchorSettings).validate_python({"method": "ta"}))
    assert merge_tensor(method, "same", large, torch.float32)[1] == "anchored"


def test_another_shape_and_nan_are_refused_in_pieces_too(large) -> None:
    method = build(TypeAdapter(AnchorSettings).validate_python({"method": "ta"}))
    large.experts[1]["table"][7, 3] = torch.nan
    with pytest.raises(CheckpointError, match="'table' of expert 2 of 3 holds NaN"):
        merge_tensor(method, "table", large, torch.float32)
    large.experts[1]["table"] = large.experts[1]["table"].T
    with pytest.raises(CheckpointError, match="'table' of expert 2 of 3 has shape"):
        merge_tensor(method, "table", large, torch.float32)
