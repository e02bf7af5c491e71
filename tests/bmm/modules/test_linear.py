from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from bmm.modules.linear import LinearMap, discover, layer_of, module_type

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 60,
    "max_position_embeddings": 40,
}
CONFIGS = {
    "bert": transformers.BertConfig(**SIZES),
    "roberta": transformers.RobertaConfig(**SIZES, pad_token_id=0),
    "distilbert": transformers.DistilBertConfig(n_layers=2, dim=16, n_heads=2, hidden_dim=32, vocab_size=60),
    "electra": transformers.ElectraConfig(**SIZES, embedding_size=8),
    "mpnet": transformers.MPNetConfig(**SIZES),
    "deberta-v2": transformers.DebertaV2Config(
        **SIZES,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        share_att_key=True,
        position_buckets=8,
        norm_rel_ebd="layer_norm",
    ),
}
# Query, key and value, and outputs, as the architecture calls them in its first layer.
PLACES = {
    "bert": ("encoder.layer.0.attention.self.query", "encoder.layer.0.attention.output.dense"),
    "roberta": ("encoder.layer.0.attention.self.key", "encoder.layer.0.attention.output.dense"),
    "distilbert": ("transformer.layer.0.attention.v_lin", "transformer.layer.0.attention.out_lin"),
    "electra": ("encoder.layer.0.attention.self.value", "encoder.layer.0.attention.output.dense"),
    "mpnet": ("encoder.layer.0.attention.attn.q", "encoder.layer.0.attention.attn.o"),
    "deberta-v2": ("encoder.layer.0.attention.self.key_proj", "encoder.layer.0.attention.output.dense"),
}


def encoder_of(family: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = transformers.AutoModelForSequenceClassification.from_config(CONFIGS[family]).base_model.eval()
    return model


def probe() -> dict[str, torch.Tensor]:
    tokens = torch.zeros((2, 6), dtype=torch.int64)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


@pytest.mark.parametrize("family", CONFIGS)
def test_every_matrix_of_the_layers_is_found_in_its_place(family: str) -> None:
    encoder = encoder_of(family)
    maps = {map_.module: map_ for map_ in discover(encoder, probe())}
    layers = {
        name.removesuffix(".weight"): tuple(parameter.shape)
        for name, parameter in encoder.named_parameters()
        if parameter.ndim == 2 and ".layer." in name
    }
    assert len(layers) == 12
    inside = {name: map_ for name, map_ in maps.items() if map_.layer is not None}
    assert {name: (map_.outputs, map_.inputs) for name, map_ in inside.items()} == layers
    for name, map_ in inside.items():
        assert map_.layer == int(name.split(".layer.")[1].split(".")[0])
        assert map_.weight == f"{name}.weight"
    assert Counter((map_.type, map_.layer) for map_ in inside.values()) == {
        (kind, layer): 3 if kind == "qkv" else 1
        for kind in ("qkv", "attention-out", "mlp-in", "mlp-out")
        for layer in (0, 1)
    }
    projection, output = PLACES[family]
    assert (maps[projection].type, maps[output].type) == ("qkv", "attention-out")
    wide = [map_ for map_ in inside.values() if map_.outputs == 32]
    assert {map_.type for map_ in wide} == {"mlp-in"}
    assert {map_.type for map_ in inside.values() if map_.inputs == 32} == {"mlp-out"}


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra", "mpnet"])
def test_query_key_and_value_share_one_input_and_nothing_else_does(family: str) -> None:
    inside = [map_ for map_ in discover(encoder_of(family), probe()) if map_.layer is not None]
    groups = Counter(map_.input_group for map_ in inside)
    assert sorted(groups.values()) == [1] * 6 + [3] * 2
    for map_ in inside:
        assert groups[map_.input_group] == (3 if map_.type == "qkv" else 1)
        assert map_.type == "qkv" or map_.input_group == map_.module


def test_maps_outside_the_layers_are_other() -> None:
    pooler = {map_.module: map_ for map_ in discover(encoder_of("bert"), probe())}["pooler.dense"]
    assert (pooler.type, pooler.layer, pooler.input_group) == ("other", None, "pooler.dense")
    projection = {map_.module: map_ for map_ in discover(encoder_of("electra"), probe())}["embeddings_project"]
    assert (projection.type, projection.layer, projection.inputs, projection.outputs) == ("other", None, 8, 16)


def test_a_projection_that_serves_positions_too_does_not_share_with_one_that_does_not() -> None:
    # With shared attention keys, DeBERTa's query and key also project the relative positions; its value does not.
    prefix = "encoder.layer.0.attention.self"
    group = {map_.module: map_.input_group for map_ in discover(encoder_of("deberta-v2"), probe())}
    assert group[f"{prefix}.query_proj"] == group[f"{prefix}.key_proj"] == f"{prefix}.query_proj"
    assert group[f"{prefix}.value_proj"] == f"{prefix}.value_proj"


class Repeating(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(4, 4)
        self.right = nn.Linear(4, 4)
        self.once = nn.Linear(4, 4)
        self.never = nn.Linear(4, 4)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        states = input_ids.float()
        first = self.left(states) + self.right(states) + self.once(states)
        return self.left(first) + self.right(first)


def test_maps_that_fire_twice_share_only_with_those_that_read_all_the_same() -> None:
    maps = discover(Repeating(), {"input_ids": torch.ones(2, 4)})
    assert {map_.module: map_.input_group for map_ in maps} == {"left": "left", "right": "left", "once": "once"}


def test_watching_leaves_no_hook_behind() -> None:
    encoder = encoder_of("bert")
    discover(encoder, probe())
    with pytest.raises(ValueError, match="input_ids"):
        discover(encoder, {"no_such_input": torch.ones(1)})
    assert not any(module._forward_pre_hooks for module in encoder.modules())


def test_a_map_survives_json() -> None:
    maps = discover(encoder_of("distilbert"), probe())
    assert tuple(LinearMap.from_json(value) for value in json.loads(json.dumps([m.to_json() for m in maps]))) == maps


@pytest.mark.parametrize(
    ("name", "kind", "layer"),
    [
        ("model.layers.11.self_attn.q_proj", "qkv", 11),
        ("model.layers.3.self_attn.o_proj", "attention-out", 3),
        ("model.layers.3.mlp.gate_proj", "mlp-in", 3),
        ("model.layers.3.mlp.up_proj", "mlp-in", 3),
        ("model.layers.3.mlp.down_proj", "mlp-out", 3),
        ("encoder.layers.10.self_attn.out_proj", "attention-out", 10),
        ("encoder.layers.10.fc1", "mlp-in", 10),
        ("encoder.layers.10.fc2", "mlp-out", 10),
        ("h.7.attn.c_proj", "attention-out", 7),
        ("h.7.mlp.c_proj", "mlp-out", 7),
        ("h.7.mlp.c_fc", "mlp-in", 7),
        ("blocks.2.attn.qkv", "qkv", 2),
        ("blocks.2.attn.proj", "attention-out", 2),
        ("pooler.dense", "other", None),
        ("embeddings_project", "other", None),
    ],
)
def test_names_of_other_families_are_known(name: str, kind: str, layer: int | None) -> None:
    assert (module_type(name), layer_of(name)) == (kind, layer)
