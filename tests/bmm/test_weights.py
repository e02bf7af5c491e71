from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bmm.checkpoint.architecture import Architecture
from bmm.checkpoint.comparison import compare
from bmm.checkpoint.reader import Checkpoint
from bmm.errors import CheckpointError
from bmm.modules.linear import LinearMap
from bmm.weights import ExpertWeights, require_finite

QUERY = "encoder.layer.0.attention.self.query.weight"
MAP = LinearMap("encoder.layer.0.attention.self.query", 16, 16, "query", "qkv", 0, QUERY)


def opened(pico: Path) -> ExpertWeights:
    base = Checkpoint.open(pico / "base")
    experts = {name: Checkpoint.open(pico / "experts" / name) for name in ("task1", "task0")}
    classifier = Architecture("AutoModelForSequenceClassification", "text classifier")
    layout = compare(base, experts, dict.fromkeys(experts, classifier))
    return ExpertWeights(base, experts, layout, [MAP])


def test_tensors_come_by_canonical_name_and_experts_in_the_order_given(pico: Path) -> None:
    weights = opened(pico)
    assert weights.count == 2
    assert QUERY in weights.names()
    assert not [name for name in weights.names() if name.startswith(("bert.", "classifier"))]
    assert torch.equal(weights.base(QUERY), load_file(pico / "base" / "model.safetensors")[QUERY])
    for index, name in enumerate(("task1", "task0")):
        stored = load_file(pico / "experts" / name / "model.safetensors")
        assert torch.equal(weights.expert(index, QUERY), stored[f"bert.{QUERY}"])
    assert not torch.equal(weights.expert(0, QUERY), weights.expert(1, QUERY))
    assert weights.parameter(QUERY).shape == (16, 16)
    assert list(weights.maps(QUERY)) == [MAP]
    assert not weights.maps("embeddings.word_embeddings.weight")


def test_rows_that_only_one_side_has_are_left_out_or_the_bases(pico: Path) -> None:
    table = "embeddings.word_embeddings.weight"
    stored = {}
    for name, rows in (("task1", 70), ("task0", 60)):
        folder = pico / "experts" / name
        tensors = load_file(folder / "model.safetensors")
        old = tensors[f"bert.{table}"].to(torch.bfloat16)
        stored[name] = torch.cat([old, old])[:rows]
        save_file({**tensors, f"bert.{table}": stored[name]}, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))
    weights = opened(pico)
    base = weights.base(table)
    assert base.shape == (65, 16)
    assert torch.equal(weights.expert(0, table), stored["task1"][:65])
    assert torch.equal(weights.expert(1, table), torch.cat([stored["task0"].float(), base[60:]]))
    assert weights.parameter(table).shared_rows == 60
    # The rows that travel with the head are looked at as well.
    stored["task1"][68, 3] = float("nan")
    file = pico / "experts" / "task1" / "model.safetensors"
    save_file({**load_file(file), f"bert.{table}": stored["task1"]}, file, metadata={"format": "pt"})
    weights = opened(pico)
    weights.check_finite(0, table)
    with pytest.raises(CheckpointError, match="1 NaN"):
        weights.check_head_finite(0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_entries_that_are_not_finite_are_counted_and_named(pico: Path, value: float) -> None:
    file = pico / "experts" / "task0" / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    tensors[f"bert.{QUERY}"][3, 4:6] = value
    save_file(tensors, file, metadata={"format": "pt"})
    weights = opened(pico)
    weights.check_finite(0, QUERY)
    with pytest.raises(
        CheckpointError, match=rf"experts/task0: the tensor bert\.{QUERY} has 2 NaN or infinite entries"
    ):
        weights.check_finite(1, QUERY)


def test_integers_are_always_finite(pico: Path) -> None:
    with Checkpoint.open(pico / "base") as base:
        require_finite(torch.arange(3), base, "ids")
