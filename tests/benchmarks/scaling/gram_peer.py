"""RegMean, ours against fusion-bench's: the same experts, rows and threads, each in a process of its own.

    python -m benchmarks.scaling.gram_peer ours FOLDER ROWS     (or theirs)

Experts are CLIP vision towers of ViT-B/32's shape with random weights. The ratio is of the seconds until all Gram
matrices are there, ours written to disk as the Gram stage writes them, without imports and the loading of models;
memory is the peak of the whole process, merge included. The merges' own seconds stand beside: ours is solved in float64
by an eigendecomposition, fusion-bench's by an inverse in float32. Both take the encoder's linear layers only. Each has
the memory settings that its users have: ours those that workers are started with, fusion-bench glibc's own.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.measuring import by_turns, ratio, run

from bmm.memory import WORKER_ENVIRONMENT

BATCH = 32
EXPERTS = 4
MODULE = "benchmarks.scaling.gram_peer"


def measure(folder: Path, *, quick: bool) -> dict[str, Any]:
    """Return what ours takes over theirs, in seconds and in memory."""
    rows, layers = (32, 3) if quick else (128, 12)
    with TemporaryDirectory(dir=folder) as place:
        run(["-m", MODULE, "experts", place, str(layers)])
        runs: dict[str, list[Any]] = {"ours": [], "theirs": []}

        def one(whose: str) -> float:
            environment = WORKER_ENVIRONMENT if whose == "ours" else None
            runs[whose].append(run(["-m", MODULE, whose, place, str(rows)], environment=environment, threads=1))
            return float(runs[whose][-1].said["gram_seconds"])

        taken = by_turns({whose: lambda whose=whose: one(whose) for whose in runs}, 1 if quick else 3)
    memory = {whose: [float(found.peak_rss_bytes) for found in own] for whose, own in runs.items()}
    parts = {whose: [found.said for found in own] for whose, own in runs.items()}
    return {
        "gram_seconds_vs_fusion_bench": ratio(taken["ours"], taken["theirs"])["median"],
        "gram_rss_vs_fusion_bench": ratio(memory["ours"], memory["theirs"])["median"],
        "spread": {
            "seconds": ratio(taken["ours"], taken["theirs"]),
            "memory": ratio(memory["ours"], memory["theirs"]),
        },
        "seconds": taken,
        "peak_rss_bytes": memory,
        "parts": parts,
        "experts": EXPERTS,
        "images": rows,
    }


class Images:
    """One expert's batches, drawn from its own seed each time that they are read."""

    def __init__(self, expert: int, rows: int) -> None:
        self._expert, self._rows = expert, rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        import torch

        generator = torch.Generator().manual_seed(self._expert)
        for start in range(0, self._rows, BATCH):
            count = min(BATCH, self._rows - start)
            yield {"pixel_values": torch.randn(count, 3, 224, 224, generator=generator)}


def make_experts(folder: Path, layers: int) -> dict[str, Any]:
    """Write base and experts: a tower of random weights, and small random steps away from it."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=layers, num_attention_heads=12, patch_size=32
    )
    model = CLIPVisionModel(config).eval()
    model.save_pretrained(folder / "base")
    start = {name: value.clone() for name, value in model.state_dict().items()}
    for index in range(EXPERTS):
        torch.manual_seed(index + 1)
        model.load_state_dict(
            {
                name: value + 0.01 * torch.randn_like(value) if value.is_floating_point() else value
                for name, value in start.items()
            }
        )
        model.save_pretrained(folder / f"expert-{index}")
    return {}


def theirs(folder: Path, rows: int) -> dict[str, Any]:
    """Run fusion-bench's RegMean."""
    from fusion_bench.method.regmean import regmean as module
    from peers.fusion_bench_runs import regmean
    from transformers import CLIPVisionModel

    models = [_load(CLIPVisionModel, folder, index) for index in range(EXPERTS)]
    solve, collected = module.merging_with_regmean_weights, []

    def noted(*given: Any, **named: Any) -> Any:
        collected.append(time.perf_counter())
        return solve(*given, **named)

    module.merging_with_regmean_weights = noted
    started = time.perf_counter()
    merged = regmean(models, [Images(index, rows) for index in range(EXPERTS)])
    ended = time.perf_counter()
    return {"gram_seconds": collected[0] - started, "merge_seconds": ended - collected[0], "tensors": len(merged)}


def ours(folder: Path, rows: int) -> dict[str, Any]:
    """Run ours: an expert at a time, Gram matrices to disk, then the merge tensor by tensor."""
    import torch
    from transformers import CLIPVisionModel

    from bmm.anchors.registry import build
    from bmm.anchors.settings import RegMeanSettings
    from bmm.checkpoint.mapped import mapped
    from bmm.grams import store
    from bmm.grams.collect import collect
    from bmm.modules.linear import discover
    from bmm.threads import one_thread

    files = [mapped([folder / f"expert-{index}" / "model.safetensors"]) for index in range(EXPERTS)]
    base = mapped([folder / "base" / "model.safetensors"])
    gathering = collecting = 0.0
    maps: list[Any] = []
    with one_thread():
        for index in range(EXPERTS):
            model = _load(CLIPVisionModel, folder, index)
            started = time.perf_counter()
            if not maps:
                maps = [
                    map_
                    for map_ in discover(model, {"pixel_values": torch.zeros(2, 3, 224, 224)})
                    if len(base[_stored(map_.weight, base)].tensor(_stored(map_.weight, base)).shape) == 2
                ]
            readers = list({map_.input_group: map_ for map_ in reversed(maps)}.values())[::-1]
            sums = collect(model, Images(index, rows), readers)
            collecting += time.perf_counter() - started
            store.write(folder / f"grams-{index}.zarr", sorted(sums.items()), {})
            gathering += time.perf_counter() - started
            del model, sums
        started = time.perf_counter()
        group_of = {map_.module: map_.input_group for map_ in maps}
        grams = [store.GramReader(folder / f"grams-{index}.zarr") for index in range(EXPERTS)]
        weights = _Weights(base, files, maps)
        method: Any = build(RegMeanSettings(), _sources(lambda index, name: grams[index].gram(group_of[name])))
        merged = {name: method.merge(name, weights).tensor for name in weights.names()}
        solving = time.perf_counter() - started
    said = {"gram_seconds": gathering, "without_writing": collecting, "merge_seconds": solving}
    return {**said, "tensors": len(merged)}


def _sources(gram: Any) -> Any:
    from bmm.anchors.interface import Sources

    return Sources(gram=gram)


def _stored(name: str, base: dict[str, Any]) -> str:
    """Return the name in the file: the tower's class may add a prefix."""
    return next(key for key in base if key == name or key.endswith(f".{name}"))


class _Weights:
    """The towers' tensors, as the anchors read them."""

    def __init__(self, base: dict[str, Any], experts: list[dict[str, Any]], maps: list[Any]) -> None:
        self._base, self._experts = base, experts
        self._maps = {_stored(map_.weight, base): [map_] for map_ in maps}
        self.count = len(experts)

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._base))

    def base(self, name: str) -> Any:
        return self._base[name].tensor(name)

    def expert(self, index: int, name: str) -> Any:
        return self._experts[index][name].tensor(name)

    def maps(self, name: str) -> list[Any]:
        return self._maps.get(name, [])


def _load(kind: Any, folder: Path, index: int) -> Any:
    return kind.from_pretrained(folder / f"expert-{index}", local_files_only=True).eval()


if __name__ == "__main__":
    what, place, number = sys.argv[1:]
    print(json.dumps({"experts": make_experts, "theirs": theirs, "ours": ours}[what](Path(place), int(number))))
