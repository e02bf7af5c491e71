"""Collecting Gram matrices against its floor: a bare forward pass over the same rows, and the symmetric products.

The products' part is `rows · d · (d + 1)` floating-point operations for each distinct input, at the rate of torch's own
product `XᵀX` of that width in the same turn. One thread, as in a worker.

Beside it, what keeping only a sample of each sequence's tokens takes of collecting with all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.measuring import by_turns, ratio, seconds


@dataclass(frozen=True)
class Shape:
    """An encoder by its width, layers and hidden units, and how many tokens its rows have."""

    name: str
    width: int
    layers: int
    hidden: int
    tokens: int
    batch: int
    batches: int


SHAPES = (
    Shape("text encoder, 6 layers, padded rows", 384, 6, 1536, 64, 32, 4),
    Shape("CLIP ViT-B/32 vision tower", 768, 12, 3072, 50, 32, 4),
    Shape("text encoder, 2 layers", 1536, 2, 6144, 128, 16, 8),
    Shape("text encoder, 1 layer", 3072, 1, 8192, 128, 16, 8),
)
"""Each with the rows of one shard as the Gram stage cuts them by default, 128: what a shard costs once is a part."""
QUICK = (Shape("text encoder, 2 layers, padded rows", 384, 2, 1536, 64, 32, 2),)
TOKENS = 16
"""Of each sequence, where not all are kept."""


def measure(*, quick: bool) -> dict[str, Any]:
    """Return, for each shape, what collecting takes over its floor, and with a sample of the tokens over with all."""
    found = {}
    for shape in QUICK if quick else SHAPES:
        found[str(shape.width)] = {"model": shape.name, **_measure(shape, 2 if quick else 3)}
    worst = max(found.values(), key=lambda one: one["ratio"]["median"])
    sampled = {f"{width} wide": one["sampled"] for width, one in found.items()}
    return {
        "gram_seconds_vs_floor": worst["ratio"]["median"],
        "spread": worst["ratio"],
        "gram_seconds_16_tokens_vs_all": {name: one["median"] for name, one in sampled.items()},
        "methods": {name: {"seconds": one} for name, one in sampled.items()},
        "by_width": found,
    }


def _measure(shape: Shape, repetitions: int) -> dict[str, Any]:
    import torch

    from bmm.grams.collect import collect
    from bmm.modules.linear import discover
    from bmm.modules.tokens import Sample
    from bmm.threads import one_thread

    torch.manual_seed(0)
    model, batches = _model(shape)
    maps = discover(model, {name: value[:2] for name, value in batches[0].items()})
    readers = list({map_.input_group: map_ for map_ in reversed(maps)}.values())[::-1]
    rows = {name: part.rows for name, part in collect(model, batches[:1], readers).items()}
    rates = {map_.inputs: f"rate {map_.inputs}" for map_ in readers}

    def forward() -> None:
        with torch.inference_mode():
            for batch in batches:
                model(**batch)

    def product(width: int) -> float:
        """Return the seconds that one multiplication and addition of a product of this width takes."""
        count = min(shape.batch * shape.tokens, 4096)
        rows = torch.randn(count, width)
        return seconds(lambda: rows.T @ rows) / (2 * count * width * width)

    sums: dict[str, Any] = {}

    def collected() -> None:
        sums.update(collect(model, batches, readers))

    def sampled() -> None:
        collect(model, batches, readers, Sample(TOKENS))

    with one_thread():
        taken = by_turns(
            {
                "forward": lambda: seconds(forward),
                **{name: lambda width=width: product(width) for width, name in rates.items()},
                "collect": lambda: seconds(collected),
                "sampled": lambda: seconds(sampled),
            },
            repetitions,
        )
    assert rows.keys() == sums.keys()
    flops = {
        width: sum(sums[map_.input_group].rows * width * (width + 1) for map_ in readers if map_.inputs == width)
        for width in rates
    }
    floors = [
        taken["forward"][turn] + sum(flops[width] * taken[name][turn] for width, name in rates.items())
        for turn in range(repetitions)
    ]
    return {
        "ratio": ratio(taken["collect"], floors),
        "sampled": ratio(taken["sampled"], taken["collect"]),
        "seconds": {"floor": floors, **{name: taken[name] for name in ("forward", "collect", "sampled")}},
        "gflops": {str(width): 1e-9 / min(taken[name]) for width, name in rates.items()},
        "rows": max(part.rows for part in sums.values()),
    }


def _model(shape: Shape) -> tuple[Any, list[dict[str, Any]]]:
    import torch
    from transformers import BertConfig, BertModel, CLIPVisionConfig, CLIPVisionModel

    said = {"hidden_size": shape.width, "intermediate_size": shape.hidden, "num_hidden_layers": shape.layers}
    said["num_attention_heads"] = shape.width // 64
    if "ViT" in shape.name:
        model = CLIPVisionModel(CLIPVisionConfig(**said, patch_size=32)).eval()
        return model, [{"pixel_values": torch.randn(shape.batch, 3, 224, 224)} for _ in range(shape.batches)]
    model = BertModel(BertConfig(**said, vocab_size=1000)).eval()
    batches = []
    for _ in range(shape.batches):
        lengths = torch.randint(shape.tokens * 5 // 8, shape.tokens + 1, (shape.batch,))
        mask = (torch.arange(shape.tokens) < lengths[:, None]).long()
        batches.append({"input_ids": torch.randint(1000, mask.shape), "attention_mask": mask})
    return model, batches
