"""Which weights of an encoder are in memory, and when."""

from __future__ import annotations

import copy

import pytest
import torch
from architectures import batches, encoder, hidden_states
from torch import nn

from bmm.modules.linear import discover
from bmm.modules.residence import Resident
from bmm.regression.propagate import Walk

LAYERS = ("encoder.layer.0", "encoder.layer.1")


def present(model: nn.Module) -> set[str]:
    """The layers that have a weight in memory."""
    return {layer for layer in LAYERS if any(p.numel() for p in model.get_submodule(layer).parameters())}


def test_a_layer_comes_goes_and_leaves_the_rest_alone() -> None:
    model = encoder("bert", 1)
    kept = copy.deepcopy(model)
    give = dict(kept.named_parameters())
    resident = Resident(model, give)
    assert resident.divide(LAYERS)
    assert present(model) == set()
    resident.bring(LAYERS[1], give.__getitem__)
    assert present(model) == {LAYERS[1]}
    resident.drop(LAYERS[1])
    resident.surround(give.__getitem__)
    assert present(model) == set()
    assert torch.equal(model.get_parameter("pooler.dense.weight"), give["pooler.dense.weight"])


def test_a_whole_pass_has_one_layer_in_memory_at_a_time_and_answers_alike() -> None:
    model = encoder("bert", 1)
    kept = copy.deepcopy(model)
    batch = batches("bert", 2, 3)[0]
    resident = Resident(model, dict(kept.named_parameters()))
    assert resident.divide(LAYERS)
    resident.surround(kept.get_parameter)
    seen = []
    for name in LAYERS:
        model.get_submodule(f"{name}.output").register_forward_hook(lambda *_: seen.append(present(model)))
    with resident.passing(kept.get_parameter), torch.inference_mode():
        found = hidden_states(model, batch)
    assert seen == [{LAYERS[0]}, {LAYERS[1]}]
    assert present(model) == set()
    assert torch.equal(found, hidden_states(kept, batch))


def test_a_pass_that_fails_leaves_no_layer_behind() -> None:
    model = encoder("bert", 1)
    kept = copy.deepcopy(model)
    resident = Resident(model, dict(kept.named_parameters()))
    assert resident.divide(LAYERS)
    resident.surround(kept.get_parameter)

    def fail(*_: object) -> None:
        raise RuntimeError("broken")

    model.get_submodule(f"{LAYERS[1]}.output").register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="broken"), resident.passing(kept.get_parameter):
        model(**batches("bert", 2, 3)[0])
    assert present(model) == set()


def test_layers_that_share_a_weight_stay() -> None:
    model = encoder("bert", 1)
    first, second = (model.get_submodule(f"{name}.output.dense") for name in LAYERS)
    second.weight = first.weight
    resident = Resident(model, dict(model.named_parameters()))
    assert not resident.divide(LAYERS)
    assert present(model) == set(LAYERS)


def test_a_weight_that_is_not_merged_is_left_alone() -> None:
    model = encoder("bert", 1)
    names = {name for name, _ in model.named_parameters()} - {"encoder.layer.0.output.dense.bias"}
    before = model.get_parameter("encoder.layer.0.output.dense.bias").clone()
    assert Resident(model, names).divide(LAYERS)
    assert torch.equal(model.get_parameter("encoder.layer.0.output.dense.bias"), before)


def test_a_walk_has_one_layer_in_memory_at_a_time() -> None:
    merged, expert = encoder("bert", 1), encoder("bert", 2)
    prior, own = copy.deepcopy(merged), copy.deepcopy(expert)
    rows = [batches("bert", 3, 4), batches("bert", 4, 4)]
    maps = discover(prior, {name: value[:2] for name, value in rows[0][0].items()})
    names = dict(prior.named_parameters())
    walk = Walk(merged, expert, names, prior.get_parameter, lambda _, name: own.get_parameter(name), rows, maps)
    assert walk.layers == LAYERS
    for unit in walk.units:
        for group, members in unit.groups.items():
            walk.moments(unit.name, group)
            here = set() if unit.prefix is None else {unit.prefix}
            assert present(merged) == here
            assert present(expert) <= here
            for map_ in members:
                walk.apply(map_.module, map_.matrix(prior.get_parameter))
        walk.advance(unit.name)
        assert present(merged) == present(expert) == set()
