"""Our methods against mergekit's, tensor by tensor, on pico Llama checkpoints on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peers.drawn import Drawn
from peers.mergekit_runs import configuration, merge_by_command, merge_here
from pydantic import TypeAdapter
from safetensors.torch import load_file

from bmm.anchors.registry import build
from bmm.anchors.settings import AnchorSettings


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    """A base and three experts, every weight of which has moved."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llamas")
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "base")
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for index in range(3):
        torch.manual_seed(index + 1)
        model.load_state_dict({name: tensor + 0.02 * torch.randn_like(tensor) for name, tensor in start.items()})
        model.save_pretrained(folder / f"expert{index}")
    return folder


@pytest.fixture(scope="module")
def weights(llamas, weights_of):
    base, *experts = (
        load_file(llamas / name / "model.safetensors") for name in ("base", "expert0", "expert1", "expert2")
    )
    return weights_of(base, experts)


def ours(weights, **settings):
    anchor = build(TypeAdapter(AnchorSettings).validate_python(settings))
    anchor.prepare(weights)
    return {name: anchor.merge(name, weights).tensor for name in weights.names()}


def theirs(llamas: Path, output: Path, method: str, experts: int = 3, **said):
    folders = [llamas / f"expert{index}" for index in range(experts)]
    folder = merge_here(configuration(method, llamas / "base", folders, **said), output, seed=7)
    return load_file(next(folder.glob("*.safetensors")))


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_average_is_linear(llamas, weights, tmp_path):
    assert_equal(ours(weights, method="average"), theirs(llamas, tmp_path / "out", "linear"))


def test_task_arithmetic(llamas, weights, tmp_path):
    expected = theirs(llamas, tmp_path / "out", "task_arithmetic", each={"weight": 0.3})
    assert_equal(ours(weights, method="ta", scale=0.3), expected)


@pytest.mark.parametrize("density", [0.25, 1.0])
@pytest.mark.parametrize(("combine", "scale"), [("mean", 1.0), ("sum", 0.3)])
def test_ties_per_tensor(density, combine, scale, llamas, weights, tmp_path):
    shared = {"normalize": combine == "mean", "lambda": scale}
    expected = theirs(llamas, tmp_path / "out", "ties", each={"density": density}, shared=shared)
    found = ours(weights, method="ties", scope="tensor", density=density, combine=combine, scale=scale)
    assert_equal(found, expected)


def test_ties_keeps_the_nearest_number_of_entries_and_mergekit_the_next_below(llamas, weights, tmp_path):
    density = 0.3
    expected = theirs(llamas, tmp_path / "out", "ties", each={"density": density})
    differ = 0
    for name, tensor in weights.bases.items():
        size = tensor.numel()
        kept = max(1, int(density * size))
        differ += kept != round(density * size)
        one = type(weights)({name: tensor}, [{name: expert[name]} for expert in weights.experts])
        found = ours(one, method="ties", scope="tensor", density=kept / size)
        assert_equal(found, {name: expected[name]})
    assert differ


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("rescale", [False, True])
def test_dare_rescales_by_probability_and_mergekit_by_the_l1_norm(method, rescale, llamas, weights, tmp_path):
    density = 0.4
    shared = {"rescale": rescale, "normalize": False}
    found = theirs(llamas, tmp_path / "out", method, experts=1, each={"density": density}, shared=shared)
    kept = total = 0
    for name, base in weights.bases.items():
        vector = weights.experts[0][name].double() - base.double()
        update = found[name].double() - base.double()
        mask = update.abs() > vector.abs() / 2
        kept, total = kept + int(mask.sum()), total + mask.numel()
        share = float((vector * mask).abs().sum() / vector.abs().sum()) if rescale else 1.0
        torch.testing.assert_close(update * share, vector * mask, rtol=1e-5, atol=3e-7)

        # Ours on the mask that mergekit drew: the same entries, times their share over the probability.
        thin = Drawn(weights, 1 - density, 0, mask).expert(0, name) - base.double()
        torch.testing.assert_close(thin, update * share / density, rtol=1e-5, atol=1e-6)
    # Five standard deviations of the share of entries that stay.
    assert abs(kept / total - density) < 5 * (density * (1 - density) / total) ** 0.5


def test_the_command_gives_what_the_library_gives(llamas, tmp_path):
    config = configuration("linear", llamas / "base", [llamas / "expert0", llamas / "expert1"])
    by_command = load_file(next(merge_by_command(config, tmp_path / "command").glob("*.safetensors")))
    assert_equal(by_command, load_file(next(merge_here(config, tmp_path / "here").glob("*.safetensors"))))
