"""A language model of Llama's shape and experts of it, made locally a layer at a time; weights are random.

For what depends on sizes alone: memory, disk and time. The whole model is never in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers


@dataclass(frozen=True)
class Shape:
    """Sizes as Llama's config.json names them; the defaults are TinyLlama's, 1.1 billion parameters."""

    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_hidden_layers: int = 22
    num_attention_heads: int = 32
    num_key_value_heads: int = 4
    vocab_size: int = 32000

    def tensors(self) -> Iterator[tuple[str, dict[str, tuple[int, ...]]]]:
        """Yield the shapes of tensors by stored name, a file's at a time."""
        hidden, inner = self.hidden_size, self.intermediate_size
        narrow = hidden // self.num_attention_heads * self.num_key_value_heads
        table = (self.vocab_size, hidden)
        yield "outside", {"model.embed_tokens.weight": table, "lm_head.weight": table, "model.norm.weight": (hidden,)}
        for layer in range(self.num_hidden_layers):
            place = f"model.layers.{layer}."
            yield (
                f"layer-{layer:03}",
                {
                    f"{place}self_attn.q_proj.weight": (hidden, hidden),
                    f"{place}self_attn.k_proj.weight": (narrow, hidden),
                    f"{place}self_attn.v_proj.weight": (narrow, hidden),
                    f"{place}self_attn.o_proj.weight": (hidden, hidden),
                    f"{place}mlp.gate_proj.weight": (inner, hidden),
                    f"{place}mlp.up_proj.weight": (inner, hidden),
                    f"{place}mlp.down_proj.weight": (hidden, inner),
                    f"{place}input_layernorm.weight": (hidden,),
                    f"{place}post_attention_layernorm.weight": (hidden,),
                },
            )


def make(folder: Path, shape: Shape, seed: int, base: Path | None = None) -> Path:
    """Write a checkpoint in bfloat16: random weights, or those of `base` with small changes; return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    index: dict[str, str] = {}
    size = 0
    for name, shapes in shape.tensors():
        file = f"{name}.safetensors"
        tensors = {}
        for key, dimensions in shapes.items():
            if base is not None:
                tensor = _stored(base / file, key).to(torch.float32)
                tensor += 0.002 * torch.randn(dimensions, generator=generator)
            elif len(dimensions) == 1:
                tensor = torch.ones(dimensions)
            else:
                tensor = 0.02 * torch.randn(dimensions, generator=generator)
            tensors[key] = tensor.to(torch.bfloat16)
            size += tensors[key].nbytes
            index[key] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
    document = {"metadata": {"total_size": size}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(document), encoding="utf-8")
    config = transformers.LlamaConfig(
        **vars(shape), tie_word_embeddings=False, dtype="bfloat16", architectures=["LlamaForCausalLM"]
    )
    config.save_pretrained(folder)
    _tokenizer(shape.vocab_size).save_pretrained(folder)
    return folder


def texts(count: int, tokens: int, seed: int) -> list[str]:
    """Return texts of words that the tokenizer knows, a token a word."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, 1000, (count, tokens), generator=generator)
    return [" ".join(f"w{word}" for word in row) for row in drawn.tolist()]


def _stored(file: Path, key: str) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as handle:
        tensor: torch.Tensor = handle.get_tensor(key)
        return tensor


def _tokenizer(size: int) -> transformers.PreTrainedTokenizerFast:
    words = ["[PAD]", "[UNK]", "<s>", "</s>", *(f"w{index}" for index in range(min(1000, size - 4)))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", bos_token="<s>", eos_token="</s>"
    )
