"""Mixtures of experts: one matrix an expert on disk, stacks in memory; against transformers' own loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import CONFIGS
from safetensors.torch import load_file, save_file

from bmm.checkpoint.reader import Checkpoint
from bmm.errors import CheckpointError

MIXTURES = ("mixtral", "qwen2-moe", "qwen3-moe")


def saved(folder: Path, family: str, auto_class: Any = transformers.AutoModelForCausalLM) -> Any:
    torch.manual_seed(0)
    model = auto_class.from_config(CONFIGS[family]())
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("auto_class", [transformers.AutoModel, transformers.AutoModelForCausalLM])
@pytest.mark.parametrize("family", MIXTURES)
def test_a_checkpoint_gives_the_tensors_of_the_loaded_model(tmp_path: Path, family: str, auto_class: Any) -> None:
    model = saved(tmp_path, family, auto_class)
    stored = load_file(tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        expected = {name: tensor for name, tensor in model.state_dict().items() if "experts" in name}
        assert {name for name in checkpoint.names() if ".experts." in name} == expected.keys()
        for name, tensor in expected.items():
            assert checkpoint.info(name).shape == tuple(tensor.shape)
            assert torch.equal(checkpoint.tensor(name), tensor)
            conversion = checkpoint.conversion(name)
            assert conversion is not None
            assert conversion.reversible
            back = conversion.store(checkpoint.tensor)
            assert back.keys() == conversion.stored.keys()
            assert all(torch.equal(back[part], stored[part]) for part in back)
        assert set(checkpoint.names()) - expected.keys() == {name for name in stored if ".experts." not in name}


def test_stacks_of_ten_experts_and_more_keep_their_order(tmp_path: Path) -> None:
    config = CONFIGS["mixtral"]()
    config.num_local_experts = 12
    model = transformers.AutoModel.from_config(config)
    model.save_pretrained(tmp_path)
    with Checkpoint.open(tmp_path) as checkpoint:
        for name in ("layers.0.mlp.experts.gate_up_proj", "layers.1.mlp.experts.down_proj"):
            assert torch.equal(checkpoint.tensor(name), model.state_dict()[name])


def test_stacks_are_read_as_they_are_where_they_are_stored_so(tmp_path: Path) -> None:
    model = saved(tmp_path, "mixtral")
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        name = "model.layers.0.mlp.experts.down_proj"
        assert checkpoint.conversion(name) is None
        assert torch.equal(checkpoint.tensor(name), model.state_dict()[name])


@pytest.mark.parametrize("lost", ["w1", "w2"])
def test_a_stack_that_lacks_an_expert_is_refused(tmp_path: Path, lost: str) -> None:
    saved(tmp_path, "mixtral")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"model.layers.1.block_sparse_moe.experts.2.{lost}.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with Checkpoint.open(tmp_path) as checkpoint, pytest.raises(CheckpointError, match=r"layers\.1\..*again"):
        checkpoint.names()


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "t5", "vit"])
def test_other_families_are_read_as_they_are_stored(tmp_path: Path, family: str) -> None:
    saved(tmp_path, family, transformers.AutoModel)
    with Checkpoint.open(tmp_path) as checkpoint:
        assert set(checkpoint.names()) == load_file(tmp_path / "model.safetensors").keys()
        assert all(checkpoint.conversion(name) is None for name in checkpoint.names())
