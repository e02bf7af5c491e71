"""Llama-shaped checkpoints of random weights, made tensor by tensor: a base and experts a small random step away.

    python -m benchmarks.scaling.checkpoints FOLDER EXPERTS LAYERS

The 1.1-billion-parameter shape is TinyLlama's: 22 layers of 2048, 32 heads of which 4 carry keys and values, bfloat16.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from bmm.checkpoint.tensors import TensorInfo
from bmm.checkpoint.writer import write_weights

HIDDEN, INNER, HEADS, PAIRS, WORDS = 2048, 5632, 32, 4, 32000
LAYERS = 22
SHARD_BYTES = 10**9


def configuration(layers: int) -> dict[str, Any]:
    """Return the checkpoint's config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": PAIRS,
        "vocab_size": WORDS,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def tensors(layers: int) -> list[TensorInfo]:
    """Return every tensor's name, shape and dtype."""
    narrow = HIDDEN // HEADS * PAIRS
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (WORDS, HIDDEN)}
    for index in range(layers):
        layer = f"model.layers.{index}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (HIDDEN,),
            f"{layer}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            f"{layer}.self_attn.k_proj.weight": (narrow, HIDDEN),
            f"{layer}.self_attn.v_proj.weight": (narrow, HIDDEN),
            f"{layer}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{layer}.post_attention_layernorm.weight": (HIDDEN,),
            f"{layer}.mlp.gate_proj.weight": (INNER, HIDDEN),
            f"{layer}.mlp.up_proj.weight": (INNER, HIDDEN),
            f"{layer}.mlp.down_proj.weight": (HIDDEN, INNER),
        }
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (WORDS, HIDDEN)}
    return [TensorInfo(name, shape, "BF16") for name, shape in shapes.items()]


def make(folder: Path, experts: int, layers: int) -> None:
    """Write `base` and `expert-0`, `expert-1`, …, each in shards."""
    import torch

    for index in range(-1, experts):
        place = folder / ("base" if index < 0 else f"expert-{index}")
        place.mkdir(parents=True, exist_ok=True)
        (place / "config.json").write_text(json.dumps(configuration(layers)), encoding="utf-8")
        shapes = {info.name: info.shape for info in tensors(layers)}

        def get(name: str, index: int = index, shapes: dict[str, tuple[int, ...]] = shapes) -> Any:
            value = 0.02 * torch.randn(shapes[name], generator=_generator("base", name))
            if len(shapes[name]) == 1:
                value += 1.0
            if index >= 0:
                value += 0.002 * torch.randn(shapes[name], generator=_generator(str(index), name))
            return value.to(torch.bfloat16)

        write_weights(place, tensors(layers), get, SHARD_BYTES, threads=2)


def _generator(*words: str) -> Any:
    import torch

    seed = int(hashlib.sha256(" ".join(words).encode()).hexdigest()[:12], 16)
    return torch.Generator().manual_seed(seed)


if __name__ == "__main__":
    make(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
