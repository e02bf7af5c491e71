"""An expert a layer at a time gives what it gives as a whole, bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from architectures import CONFIGS, batches, encoder
from torch import nn

from bmm.errors import BMMError
from bmm.grams.collect import collect
from bmm.grams.stream import Stream
from bmm.modules.linear import LinearMap, discover
from bmm.modules.tokens import Sample


def _readers(model: nn.Module, batch: dict[str, torch.Tensor]) -> list[LinearMap]:
    maps = discover(model, batch)
    return [map_ for map_ in maps if map_.input_group == map_.module]


def _present(model: nn.Module, layers: tuple[str, ...]) -> set[str]:
    return {layer for layer in layers if any(p.numel() for p in model.get_submodule(layer).parameters())}


@pytest.mark.parametrize(
    ("family", "sample"),
    [
        *((family, None) for family in sorted(CONFIGS)),
        *((family, Sample(3, 1, 8)) for family in ("bert", "mixtral", "t5", "vit", "whisper-encoder")),
    ],
)
def test_a_streamed_expert_gives_the_same_sums(family: str, sample: Sample | None) -> None:
    model = encoder(family, 1)
    inputs = [*batches(family, 2, 3), *batches(family, 3, 2)]
    maps = _readers(model, inputs[0])
    whole = collect(model, inputs, maps, sample)
    weights = dict(copy.deepcopy(model).named_parameters(remove_duplicate=False))
    stream = Stream(model, weights, weights.__getitem__, inputs, maps, sample)
    found = {name: part for sums in stream.sums() for name, part in sums.items()}
    assert set(found) == set(whole)
    for name, part in whole.items():
        assert found[name].rows == part.rows
        assert torch.equal(found[name].total, part.total), name


def test_one_layer_is_in_memory_at_a_time() -> None:
    model = encoder("bert", 1)
    inputs = batches("bert", 2, 3)
    maps = _readers(model, inputs[0])
    weights = dict(copy.deepcopy(model).named_parameters())
    brought: list[set[str]] = []

    def give(name: str) -> torch.Tensor:
        brought.append(_present(model, layers))
        return weights[name]

    layers: tuple[str, ...] = ()
    stream = Stream(model, weights, give, inputs, maps)
    layers = stream.layers
    assert layers == ("encoder.layer.0", "encoder.layer.1")
    for sums in stream.sums():
        assert _present(model, layers) == set()
        assert len({map_.layer for map_ in maps if map_.input_group in sums}) == 1
    assert brought
    assert all(len(there) <= 1 for there in brought)


def test_the_pass_outside_of_the_layers_ends_with_the_last_map() -> None:
    model = encoder("bert", 1)
    inputs = batches("bert", 2, 3)
    maps = _readers(model, inputs[0])
    assert maps[-1].module == "pooler.dense"
    weights = dict(copy.deepcopy(model).named_parameters())
    stream = Stream(model, weights, weights.__getitem__, inputs, maps)
    ended: list[nn.Module] = []
    # Of a language model this would be the logits of a batch: gigabytes.
    model.pooler.dense.register_forward_hook(lambda module, *_: ended.append(module))
    *_, outside = stream.sums()
    assert outside["pooler.dense"].rows == sum(len(batch["input_ids"]) for batch in inputs)
    assert not ended


def test_a_map_that_no_row_reaches_is_named() -> None:
    model = encoder("bert", 1)
    inputs = batches("bert", 2, 3)
    maps = _readers(model, inputs[0])
    lost = [*maps, LinearMap("encoder.layer.1.lost", 16, 16, "encoder.layer.1.lost", "other", 1, "lost.weight")]
    weights = dict(copy.deepcopy(model).named_parameters())
    with pytest.raises(BMMError, match=r"encoder\.layer\.1\.lost was never reached"):
        list(Stream(model, weights, weights.__getitem__, inputs, lost).sums())
