"""An outline, made of names and shapes alone, against what a forward pass shows."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import architectures
import pytest
import sounds
import torch

from bmm.checkpoint.reader import Checkpoint
from bmm.errors import CheckpointError
from bmm.kinds.registry import kind_of
from bmm.modules.linear import discover, layer_prefix
from bmm.outline import Outline, outline_of, outline_of_config, read_config

CONFIGS = Path(__file__).resolve().parents[2] / "deployments" / "recipes" / "configs"
TEXT = kind_of("text-classification").architecture
LANGUAGE = kind_of("causal-lm").architecture
CLIP = kind_of("zero-shot-image-classification").architecture


@pytest.mark.parametrize("family", architectures.FAMILIES)
def test_gram_sizes_are_near_what_a_forward_pass_shows(family: str) -> None:
    encoder = architectures.encoder(family, seed=0)
    maps = discover(encoder, architectures.batches(family, seed=0, count=1)[0])
    exact = sum({map_.input_group: map_.inputs**2 for map_ in maps}.values())
    outline = Outline({name: tuple(parameter.shape) for name, parameter in encoder.named_parameters()}, 0, {})
    assert exact * 0.8 <= sum(size**2 for size in outline.gram_sizes) <= exact * 1.25
    solved = sum(map_.outputs * map_.inputs for map_ in maps)
    estimated = sum(number * outputs * inputs for number, outputs, inputs in outline.matrices.values())
    assert solved * 0.8 <= estimated <= solved * 1.25
    layers: Counter[str | None] = Counter()
    for map_ in maps:
        if map_.index is None:
            layers[layer_prefix(map_.module)] += map_.outputs
    answers = max(count for prefix, count in layers.items() if prefix is not None)
    assert answers * 0.8 <= outline.layer_answers <= answers * 1.25


@pytest.mark.parametrize("family", sounds.CONFIGS)
def test_tokens_of_a_sound_are_near_what_the_model_makes_of_it(family: str) -> None:
    config, kind = sounds.CONFIGS[family](), kind_of("audio-classification")
    outline = outline_of_config(config.to_dict(), kind.architecture, "config.json")
    model = kind.bare(config.to_dict(), "one")
    assert outline.shapes == {name: tuple(one.shape) for name, one in model.encoder.named_parameters()}
    for parameter in model.encoder.parameters():
        torch.nn.init.zeros_(parameter)
    with torch.inference_mode():
        found = model.encoder(**kind.probe(model)).last_hidden_state.shape[1]
    assert found <= outline.tokens({"max_seconds": 1.0}) <= found + 2


def test_a_configuration_outlines_what_the_checkpoint_holds(pico: Path) -> None:
    with Checkpoint.open(pico / "base") as base:
        stored = outline_of(base, TEXT)
    described = outline_of_config(read_config(pico / "base" / "config.json"), TEXT, "config.json")
    assert described.shapes == stored.shapes
    assert described.stored_bytes == stored.stored_bytes
    assert described.weights == stored.weights


@pytest.mark.parametrize(
    ("name", "architecture", "millions", "tokens", "each"),
    [
        ("openai--clip-vit-base-patch32", CLIP, 87.5, 50, 4),
        ("openai--clip-vit-base-patch16", CLIP, 85.8, 197, 4),
        ("openai--clip-vit-large-patch14", CLIP, 303.2, 257, 4),
        ("openai-community--gpt2", TEXT, 124.4, 512, 4),
        ("meta-llama--Llama-3.2-3B", LANGUAGE, 3212.7, 512, 2),
    ],
)
def test_the_configurations_beside_the_recipes_are_of_the_sizes_that_are_known(
    name: str, architecture: Any, millions: float, tokens: int, each: int
) -> None:
    outline = outline_of_config(read_config(CONFIGS / f"{name}.json"), architecture, name)
    assert outline.weights / 1e6 == pytest.approx(millions, abs=0.1)
    assert outline.tokens({"max_length": 512} if architecture is not CLIP else {}) == tokens
    assert outline.stored_bytes == each * outline.weights


def test_half_precision_is_half_the_bytes() -> None:
    config = read_config(CONFIGS / "openai-community--gpt2.json")
    whole, half = (outline_of_config({**config, "dtype": dtype}, TEXT, "here") for dtype in ("float32", "bfloat16"))
    assert half.stored_bytes * 2 == whole.stored_bytes
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read: No such file"),
        ("{", "is not JSON"),
        ("[1]", "must be a JSON object"),
        ('{"hidden_size": 3}', "has no 'model_type'"),
        ('{"model_type": "bert", "hidden_size": "wide"}', "does not describe a model"),
        ('{"model_type": "nonsense"}', "is not one that transformers has"),
    ],
)
def test_configurations_that_describe_no_model_are_refused(tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(CheckpointError, match=re.escape(said)):
        outline_of_config(read_config(path), TEXT, str(path))


def test_every_configuration_is_small_and_of_sizes_alone() -> None:
    for path in CONFIGS.glob("*.json"):
        value = json.loads(path.read_text(encoding="utf-8"))
        flat = {**value, **value.get("vision_config", {}), **value.get("text_config", {})}
        assert all(isinstance(one, int | dict) for key, one in flat.items() if key not in ("model_type", "dtype"))


@pytest.mark.parametrize(
    ("processor", "tokens"),
    [
        (None, 37 * 37 + 1),
        ("not JSON", 37 * 37 + 1),
        ({"size": {"height": 56, "width": 42}}, 17),
        ({"size": 28}, 5),
        ({"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": {"height": 224, "width": 224}}, 257),
        ({"size": {"shortest_edge": 70}, "do_center_crop": False, "crop_size": 224}, 26),
    ],
)
def test_an_image_has_as_many_tokens_as_its_processor_makes(tmp_path: Path, processor: object, tokens: int) -> None:
    if processor is not None:
        text = processor if isinstance(processor, str) else json.dumps(processor)
        (tmp_path / "preprocessor_config.json").write_text(text)
    task = {"kind": "image-classification", "image": "image"}
    outline = Outline({}, 0, {"image_size": 518, "patch_size": 14})
    assert outline.tokens(task, tmp_path) == tokens
    assert outline.tokens({"max_length": 32}, tmp_path) == 32


@pytest.mark.parametrize(
    ("kind", "config", "hidden"),
    [
        # Each has a map that reads less: patches of 14 by 14 pixels, compressed keys and values.
        ("image-classification", {"model_type": "dinov2", "hidden_size": 1536, "use_swiglu_ffn": True}, 1536),
        ("image-classification", {"model_type": "vit", "hidden_size": 1280, "intermediate_size": 5120}, 1280),
        ("causal-lm", {"model_type": "deepseek_v3"}, 7168),
    ],
)
def test_the_hidden_state_is_what_most_maps_read(kind: str, config: dict[str, Any], hidden: int) -> None:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 16, "patch_size": 14}
    outline = outline_of_config({**sizes, **config}, kind_of(kind).architecture, "config.json")
    assert outline.hidden == hidden
