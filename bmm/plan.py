"""What a merge will need before it starts: which stages are done, and how much disk and memory the rest takes.

Estimates come from headers and row counts; no weight is read. A plan that cannot fit is refused by `require_fit`, the
worst shortage first.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from bmm.checkpoint.architecture import encoder_names
from bmm.checkpoint.reader import Checkpoint
from bmm.disk import free_bytes
from bmm.errors import OutputError, RecipeError
from bmm.grams.settings import ArtifactGrams, HybridGrams, TaskVectorGrams
from bmm.pipeline import STAGES
from bmm.recipe import ExpertSource, Recipe
from bmm.requests import Requests
from bmm.sizes import parse_bytes, readable_bytes
from bmm.sources import Inputs
from bmm.stages.request import Result, recorded
from bmm.store import Store

_PROCESSOR = "preprocessor_config.json"
_FLOAT32, _FLOAT64 = 4, 8
# What Python, torch and transformers take before a weight is loaded (measured: about 450 MiB a process).
_PROCESS_BYTES = 450 * 2**20


@dataclass(frozen=True)
class StagePlan:
    """One stage: whether it is done, what it writes to the store, and the memory that it needs at its peak."""

    stage: str
    cached: bool
    disk_bytes: int
    memory_bytes: int
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """All stages, and what there is to meet them."""

    stages: tuple[StagePlan, ...]
    output_bytes: int
    store: Path
    output: Path
    store_free: int
    output_free: int
    memory_total: int

    @property
    def disk_bytes(self) -> int:
        """Bytes that will be written to the store."""
        return sum(stage.disk_bytes for stage in self.stages if not stage.cached)

    @property
    def memory_bytes(self) -> int:
        """Memory of the hungriest stage that has to run."""
        return max((stage.memory_bytes for stage in self.stages if not stage.cached), default=0)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain JSON values."""
        return {
            "stages": [dict(vars(stage)) for stage in self.stages],
            "disk_bytes": self.disk_bytes,
            "output_bytes": self.output_bytes,
            "memory_bytes": self.memory_bytes,
            "free": {"store": self.store_free, "output": self.output_free, "memory": self.memory_total},
            "store": str(self.store),
            "output": str(self.output),
        }


def cached_results(recipe: Recipe, inputs: Inputs, store: Store) -> dict[str, Result]:
    """Return the results of the stages that need not run, from the first up to the first that must."""
    requests = Requests(recipe, inputs)
    results: dict[str, Result] = {}
    for stage in STAGES:
        found = None if store.fresh else recorded(store, requests.build(stage, results))
        if found is None:
            break
        results[stage] = found
    return results


def make_plan(recipe: Recipe, inputs: Inputs, store: Store) -> Plan:
    """Estimate what the merge needs, from the headers of its checkpoints."""
    done = cached_results(recipe, inputs, store)
    if len(done) == len(STAGES):
        # Telling the encoder's tensors apart takes transformers, whose import alone is longer than all that is left.
        model = store.read(done["publish"].reference("model"))
        output_bytes = sum(entry["bytes"] for entry in model.manifest["files"].values())
        stages = tuple(StagePlan(stage, True, 0, 0) for stage in STAGES)
    else:
        stages, output_bytes = _estimate(recipe, inputs, done)
    output = recipe.resolve(recipe.output)
    return Plan(
        stages=stages,
        output_bytes=output_bytes,
        store=store.root,
        output=output,
        store_free=free_bytes(store.root),
        output_free=free_bytes(output),
        memory_total=psutil.virtual_memory().total,
    )


def _estimate(recipe: Recipe, inputs: Inputs, done: Mapping[str, Result]) -> tuple[tuple[StagePlan, ...], int]:
    """Return what each stage needs, and the bytes of the output."""
    from bmm.kinds.registry import kind_of

    with Checkpoint.open(Path(inputs.base.path)) as base:
        kind = kind_of(inputs.experts[0].task["kind"])
        names = encoder_names(base, kind.architecture.prefix(base.config))
        tokens = [tokens_of(expert.task, base.config, Path(expert.model.path)) for expert in inputs.experts]
        shapes: dict[str, tuple[int, ...]] = {name: base.info(stored).shape for name, stored in names.items()}
        output_bytes = sum(base.info(stored).nbytes for stored in names.values())
    weights = sum(math.prod(shape) for shape in shapes.values())
    matrices: dict[str, tuple[int, ...]] = {
        name: shape for name, shape in shapes.items() if len(shape) == 2 and "embedding" not in name
    }
    experts = len(inputs.experts)
    gram = sum(shape[1] ** 2 for shape in _distinct_inputs(matrices).values()) * _FLOAT64
    factors = gram + sum(math.prod(shape) for shape in matrices.values()) * _FLOAT64
    model = weights * _FLOAT32
    rows = sum(_calibration_rows(expert) * most for expert, most in zip(recipe.experts, tokens, strict=True))
    widest = max((sum(shape) for shape in matrices.values()), default=0)
    walked = recipe.regression.mode == "propagated"
    # The walk keeps a layer's answers to every calibration row, and the moments of every layer in the store.
    walk_memory, walk_disk = (4 * rows * widest * _FLOAT32, factors) if walked else (0, 0)
    gram_stage, gram_note = _grams(recipe, model, gram)
    compared = len(recipe.evaluation.compare)
    # Gradients are summed in float64, beside the model and one row's own.
    fishers, fisher_memory = experts * model, 4 * model
    anchored = fishers if recipe.anchor.method == "fisher" else 0
    if "fisher" in recipe.evaluation.compare and not anchored:
        compared += experts
    shown = {
        "experts": (0, _PROCESS_BYTES + model),
        "task-vectors": (0, _PROCESS_BYTES),
        "grams": gram_stage,
        "anchor": (
            model * (2 if recipe.anchor.chooses_scale else 1) + anchored,
            _PROCESS_BYTES + model + (fisher_memory if anchored else 0),
        ),
        "search": (
            output_bytes + walk_disk,
            _PROCESS_BYTES + 4 * model + max(factors + gram // max(len(matrices), 1) * experts, walk_memory),
        ),
        "evaluate": (
            model * compared,
            _PROCESS_BYTES + max(3 * model, fisher_memory if "fisher" in recipe.evaluation.compare else 0),
        ),
        "publish": (output_bytes, _PROCESS_BYTES),
    }
    notes = {"grams": gram_note}
    stages = tuple(
        StagePlan(name, name in done, disk, memory, notes.get(name, "")) for name, (disk, memory) in shown.items()
    )
    return stages, output_bytes


def _grams(recipe: Recipe, model: int, gram: int) -> tuple[tuple[int, int], str]:
    """Return the disk and the memory that the Gram matrices take, and what a person should know of the work.

    Args:
        recipe: says where they come from.
        model: bytes of one model in memory.
        gram: bytes of one expert's matrices.
    """
    experts, settings = len(recipe.experts), recipe.grams
    match settings:
        case TaskVectorGrams():
            return (gram * experts, _PROCESS_BYTES + gram), "from the task vectors, no data"
        case ArtifactGrams():
            return (gram * experts, _PROCESS_BYTES), "made elsewhere, copied"
    shards = sum(math.ceil(_calibration_rows(expert) / settings.shard_rows) for expert in recipe.experts)
    copies = experts * (3 if isinstance(settings, HybridGrams) else 1)
    workers, each = recipe.cluster.workers, _PROCESS_BYTES + model + 2 * gram
    note = f"{shards} shards, {workers} workers, each needs {each / 2**30:.1f} GiB"
    return (gram * (copies + shards), workers * each), note


def _calibration_rows(expert: ExpertSource) -> int:
    """Return how many calibration rows an expert has, or about how many, where only its file knows."""
    source = expert.splits().get("calibration")
    return 0 if source is None else source.rows or 256


def require_fit(plan: Plan, recipe: Recipe) -> None:
    """Refuse a plan that cannot fit, naming the worst shortage and what to change.

    Raises:
        OutputError: too little disk for the store or the output.
        RecipeError: too little memory, in all or for a worker.
    """
    shortages: list[tuple[float, Exception]] = []
    for what, needed, free, remedy in (
        (f"the store {plan.store}", plan.disk_bytes, plan.store_free, "name another disk with --store or prune it"),
        (f"the output {plan.output}", plan.output_bytes, plan.output_free, "name another folder with 'output'"),
    ):
        if needed > free:
            message = (
                f"{what} needs {readable_bytes(needed)} but its disk is full but for {readable_bytes(free)}; {remedy}"
            )
            shortages.append((needed / max(free, 1), OutputError(message)))
    if plan.memory_bytes > plan.memory_total:
        hungriest = max((stage for stage in plan.stages if not stage.cached), key=lambda stage: stage.memory_bytes)
        message = (
            f"the stage '{hungriest.stage}' needs {readable_bytes(hungriest.memory_bytes)} of memory, this machine has "
            f"{readable_bytes(plan.memory_total)}; lower cluster.workers or use a larger machine"
        )
        shortages.append((plan.memory_bytes / plan.memory_total, RecipeError(message)))
    grams = next(stage for stage in plan.stages if stage.stage == "grams")
    each, limit = grams.memory_bytes // recipe.cluster.workers, parse_bytes(recipe.cluster.memory_limit)
    if recipe.grams.source in ("activations", "hybrid") and not grams.cached and each > limit:
        message = (
            f"'cluster.memory_limit' is {readable_bytes(limit)}, but a worker needs {readable_bytes(each)}; raise it"
        )
        shortages.append((each / limit, RecipeError(message)))
    if shortages:
        raise max(shortages, key=lambda shortage: shortage[0])[1]


def tokens_of(task: Mapping[str, Any], config: Mapping[str, Any], folder: Path) -> int:
    """Return how many tokens a row of a task has at most: as many as it is cut to, or as an image has patches.

    An image is as large as the image processor in the expert's `folder` makes it, else as the model was made for.
    """
    if "max_length" in task:
        return int(task["max_length"])
    vision = config.get("vision_config") or config
    image, patch = (vision.get(name) or default for name, default in (("image_size", 224), ("patch_size", 16)))
    sides = [max(size) if isinstance(size, list) else int(size) for size in (image, patch)]
    return ((_processed_side(folder) or sides[0]) // sides[1]) ** 2 + 1


def _processed_side(folder: Path) -> int | None:
    """Return the longest side of the images that a folder's image processor makes, None where it does not say."""
    try:
        document = json.loads((folder / _PROCESSOR).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    size = document.get("crop_size" if document.get("do_center_crop") else "size")
    given = size.values() if isinstance(size, dict) else [size]
    return max((side for side in given if isinstance(side, int)), default=None)


def _distinct_inputs(matrices: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Drop matrices that surely share their input with another (key and value beside query)."""
    return {
        name: shape
        for name, shape in matrices.items()
        if not any(part in name for part in (".key.", ".value.", ".k_lin.", ".v_lin.", ".k_proj.", ".v_proj."))
    }
