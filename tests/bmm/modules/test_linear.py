from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
import torch
import transformers
from architectures import FAMILIES, batches, encoder
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

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


# What a family's encoder keeps in matrices that no product reads: tables, and what is not a linear map of its rows.
NOT_MAPS = {
    "whisper-encoder": {"conv1.weight", "conv2.weight", "embed_positions.weight"},
    "vit": {"embeddings.cls_token", "embeddings.position_embeddings"},
    "dinov2": {"embeddings.cls_token", "embeddings.mask_token", "embeddings.position_embeddings"},
    "clip-vision": {"embeddings.position_embedding.weight"},
    "bert": {f"embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")},
    "roberta": {f"embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")},
    "distilbert": {f"embeddings.{kind}_embeddings.weight" for kind in ("word", "position")},
    "deberta-v2": {
        "embeddings.word_embeddings.weight",
        "embeddings.position_embeddings.weight",
        "encoder.rel_embeddings.weight",
    },
    "gpt2": {"wte.weight", "wpe.weight"},
    "openclip": set(),
    "t5-encoder": {"shared.weight", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"},
    "t5": {
        "shared.weight",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_no_matrix_of_any_family_is_missed(family: str) -> None:
    model = encoder(family, 0)
    maps = discover(model, {name: value[:2] for name, value in batches(family, 1)[0].items()})
    matrices = {name for name, parameter in model.named_parameters() if parameter.ndim >= 2}
    assert matrices - {map_.weight for map_ in maps} == NOT_MAPS.get(family, {"embed_tokens.weight"})
    sizes: dict[str, int] = {}
    for map_ in maps:
        sizes[map_.weight] = sizes.get(map_.weight, 0) + map_.outputs * map_.inputs
    assert sizes == {name: model.get_parameter(name).numel() for name in sizes}
    biases = {name for map_ in maps for name in map_.parameters if name.endswith("bias")}
    held = {map_.module for map_ in maps}
    wanted = {name for name, _ in model.named_parameters() if name.endswith("bias") and name.rpartition(".")[0] in held}
    assert biases >= wanted


@pytest.mark.parametrize("family", FAMILIES)
def test_every_map_of_a_layer_has_a_known_type(family: str) -> None:
    model = encoder(family, 0)
    maps = discover(model, {name: value[:2] for name, value in batches(family, 1)[0].items()})
    unknown = {map_.module.rpartition(".")[2] for map_ in maps if map_.layer is not None and map_.type == "other"}
    assert unknown <= {"gate", "shared_expert_gate"}, "a mixture's router is neither attention nor MLP"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_map_is_what_its_matrix_does(family: str) -> None:
    # Written through `place`, read back through `matrix`, and seen by the forward pass.
    model = encoder(family, 0)
    batch = {name: value[:2] for name, value in batches(family, 1)[0].items()}
    for map_ in discover(model, batch)[:9]:
        before = map_.matrix(model.get_parameter)
        solution = torch.arange(before.numel(), dtype=torch.float64).reshape(before.shape) / before.numel()
        map_.place(solution, model.get_parameter)
        torch.testing.assert_close(map_.matrix(model.get_parameter), solution, rtol=1e-6, atol=1e-6)
        map_.place(before, model.get_parameter)
        assert torch.equal(map_.matrix(model.get_parameter), before)


def test_a_tied_output_projection_is_left_alone() -> None:
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=60, bos_token_id=0, eos_token_id=0)
    tied = transformers.AutoModelForCausalLM.from_config(config)
    assert not any(map_.weight == "transformer.wte.weight" for map_ in discover(tied, probe()))
    config.tie_word_embeddings = False
    free = transformers.AutoModelForCausalLM.from_config(config)
    assert [map_.weight for map_ in discover(free, probe())][-1] == "lm_head.weight"


def test_watching_leaves_everything_as_it_was() -> None:
    model = encoder("mixtral", 0)
    fast, chosen = torch.backends.mha.get_fastpath_enabled(), model.config._experts_implementation
    with pytest.raises(TypeError):
        discover(model, {"input_ids": "no tensor"})  # type: ignore[dict-item]
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert model.config._experts_implementation == chosen
    assert not any(module._forward_pre_hooks for module in model.modules())


class Multiplied(TorchDispatchMode):
    """Notes the memory of every two-dimensional tensor that an operator really reads."""

    def __init__(self) -> None:
        super().__init__()
        self.read: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.linear.default):
            self.read |= {value.untyped_storage().data_ptr() for value in args if value.device.type != "meta"}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "mixtral"])
def test_no_weight_is_multiplied_to_find_the_maps(family: str) -> None:
    model = encoder(family, 0)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    with Multiplied() as seen, torch.inference_mode():
        model(**batches(family, 1)[0])
    assert weights & seen.read
    with Multiplied() as seen:
        maps = discover(model, batches(family, 1)[0])
    assert maps
    assert not weights & seen.read


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
