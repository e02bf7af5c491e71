"""Pico encoders of every family that a merge must cover, with inputs for them; weights are random and wide."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.whisper.modeling_whisper import WhisperEncoder

Batch = dict[str, torch.Tensor]

_TEXT: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 40,
    "max_position_embeddings": 24,
    "pad_token_id": 0,
}
_DECODER: dict[str, Any] = {**_TEXT, "num_key_value_heads": 1, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2}
_IMAGE: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 12,
    "patch_size": 4,
}
_EXPERTS = {"num_experts": 3, "moe_intermediate_size": 12, "num_experts_per_tok": 2}
_T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 40}


class FusedAttention(nn.Module):
    """An image tower as OpenCLIP has it: `nn.MultiheadAttention` with one `in_proj_weight`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 16)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, norm_first=True) for _ in range(2)
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return hidden states `(rows, tokens, 16)` of patches `(rows, tokens, 12)`."""
        hidden: torch.Tensor = self.embed(pixel_values)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


_DEBERTA = {
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "share_att_key": True,
    "position_buckets": 8,
    "norm_rel_ebd": "layer_norm",
}
_WHISPER = {
    "d_model": 16,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "num_mel_bins": 8,
    "max_source_positions": 10,
}
_GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2}
_DISTIL = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "vocab_size": 40}
_DINO = {key: value for key, value in _IMAGE.items() if key != "intermediate_size"} | {"layerscale_value": 0.5}

CONFIGS: dict[str, Callable[[], Any]] = {
    "bert": lambda: transformers.BertConfig(**_TEXT),
    "roberta": lambda: transformers.RobertaConfig(**_TEXT),
    "distilbert": lambda: transformers.DistilBertConfig(**_DISTIL, pad_token_id=0),
    "deberta-v2": lambda: transformers.DebertaV2Config(**_TEXT, **_DEBERTA),
    "vit": lambda: transformers.ViTConfig(**_IMAGE),
    "dinov2": lambda: transformers.Dinov2Config(**_DINO),
    "clip-vision": lambda: transformers.CLIPVisionConfig(**_IMAGE),
    "gpt2": lambda: transformers.GPT2Config(**_GPT2),
    "llama": lambda: transformers.LlamaConfig(**_DECODER),
    "qwen2": lambda: transformers.Qwen2Config(**_DECODER),
    "qwen3": lambda: transformers.Qwen3Config(**_DECODER),
    "gemma": lambda: transformers.GemmaConfig(**_DECODER),
    "gemma2": lambda: transformers.Gemma2Config(**_DECODER),
    "t5-encoder": lambda: transformers.T5Config(**_T5),
    "t5": lambda: transformers.T5Config(**_T5, feed_forward_proj="gated-gelu"),
    "mixtral": lambda: transformers.MixtralConfig(**_DECODER, num_local_experts=3),
    "qwen2-moe": lambda: transformers.Qwen2MoeConfig(**_DECODER, **_EXPERTS, shared_expert_intermediate_size=12),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(**_DECODER, **_EXPERTS),
    "whisper-encoder": lambda: transformers.WhisperConfig(**_WHISPER),
}
"""Configurations of transformers' families."""
_OTHERS: dict[str, Callable[[], nn.Module]] = {
    "clip-vision": lambda: transformers.CLIPVisionModel(CONFIGS["clip-vision"]()),
    "openclip": FusedAttention,
    "t5-encoder": lambda: transformers.T5EncoderModel(CONFIGS["t5-encoder"]()),
    "whisper-encoder": lambda: WhisperEncoder(CONFIGS["whisper-encoder"]()),
}
FAMILIES: dict[str, Callable[[], nn.Module]] = {
    family: partial(lambda make: transformers.AutoModel.from_config(make()), make) for family, make in CONFIGS.items()
} | _OTHERS
MIXTURES = frozenset({"mixtral", "qwen2-moe", "qwen3-moe"})
NOT_CHAINS = frozenset({"t5"})
"""Its decoder is fed by another stack beside the layer before."""


def encoder(family: str, seed: int) -> nn.Module:
    """Return an encoder in evaluation mode, float32; equal seeds, equal weights."""
    transformers.logging.set_verbosity_error()
    torch.manual_seed(seed)
    model = FAMILIES[family]().eval().requires_grad_(False)
    for parameter in model.parameters():
        # As wide as trained weights: at the initial 0.02 every layer would be all but linear.
        parameter.add_(0.25 * torch.randn(parameter.shape))
    return model


def batches(family: str, seed: int, count: int = 6, rows: int = 8) -> list[Batch]:
    """Return batches of random inputs; texts are padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    return [_batch(family, generator, rows) for _ in range(count)]


def _batch(family: str, generator: torch.Generator, rows: int) -> Batch:
    if family in ("vit", "dinov2", "clip-vision"):
        return {"pixel_values": torch.randn(rows, 3, 12, 12, generator=generator)}
    if family == "openclip":
        return {"pixel_values": torch.randn(rows, 5, 12, generator=generator)}
    if family == "whisper-encoder":
        return {"input_features": torch.randn(rows, 8, 20, generator=generator)}
    lengths = torch.randint(3, 17, (rows,), generator=generator)
    mask = (torch.arange(16)[None] < lengths[:, None]).long()
    tokens = torch.randint(1, 40, (rows, 16), generator=generator) * mask
    batch = {"input_ids": tokens, "attention_mask": mask}
    if family == "t5":
        batch |= {"decoder_input_ids": tokens, "decoder_attention_mask": mask}
    return batch


def hidden_states(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return what the encoder makes of a batch, `(rows, width)` without padding."""
    with torch.inference_mode():
        output = model(**batch)
    hidden: torch.Tensor = output if isinstance(output, torch.Tensor) else output.last_hidden_state
    mask = batch.get("attention_mask")
    return hidden.flatten(0, 1) if mask is None else hidden[mask.bool()]
