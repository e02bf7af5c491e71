"""What a merge will need before it starts: which stages are done, and how much disk and memory the rest takes.

Estimates (`bmm.estimate`) come from headers and row counts; no weight is read. A plan that cannot fit is refused by
`require_fit`, the worst shortage first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from bmm.checkpoint.reader import Checkpoint
from bmm.disk import free_bytes
from bmm.errors import OutputError, RecipeError
from bmm.estimate import StagePlan, estimate_stages, worker_shortage
from bmm.imports import import_torch_and_transformers
from bmm.outline import outline_of
from bmm.pipeline import stages_of
from bmm.recipe import Recipe
from bmm.requests import Requests
from bmm.row_counts import calibration_rows
from bmm.sizes import readable_bytes
from bmm.sources import Inputs
from bmm.stages.request import Result, recorded
from bmm.store import Store


@dataclass(frozen=True)
class Plan:
    """All stages, and what there is to meet them.

    `work` is the store's folder on this machine, where artefacts are made (and kept, unless the store is elsewhere);
    `store_free` is None where nobody can say.
    """

    stages: tuple[StagePlan, ...]
    output_bytes: int
    store: str
    work: Path
    output: Path
    store_free: int | None
    work_free: int
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
            "free": {
                "store": self.store_free,
                "work": self.work_free,
                "output": self.output_free,
                "memory": self.memory_total,
            },
            "store": self.store,
            "work": str(self.work),
            "output": str(self.output),
        }


def cached_results(recipe: Recipe, inputs: Inputs, store: Store) -> dict[str, Result]:
    """Return the results of the stages that need not run, from the first up to the first that must."""
    requests = Requests(recipe, inputs)
    results: dict[str, Result] = {}
    for stage in stages_of(recipe):
        found = None if store.fresh else recorded(store, requests.build(stage, results))
        if found is None:
            break
        results[stage] = found
    return results


def make_plan(recipe: Recipe, inputs: Inputs, store: Store) -> Plan:
    """Estimate what the merge needs, from the headers of its checkpoints."""
    done = cached_results(recipe, inputs, store)
    if len(done) == len(stages_of(recipe)):
        # Telling the encoder's tensors apart takes transformers, whose import alone is longer than all that is left.
        model = store.read(done["publish"].reference("model"))
        output_bytes = sum(entry["bytes"] for entry in model.manifest["files"].values())
        stages = tuple(StagePlan(stage, True, 0, 0) for stage in stages_of(recipe))
    else:
        stages, output_bytes = _estimate(recipe, inputs, done)
        stages = tuple(stage for stage in stages if stage.stage in stages_of(recipe))
    output = recipe.resolve(recipe.output)
    return Plan(
        stages=stages,
        output_bytes=output_bytes,
        store=store.location,
        work=store.root,
        output=output,
        store_free=store.free_bytes(),
        work_free=free_bytes(store.root),
        output_free=free_bytes(output),
        memory_total=psutil.virtual_memory().total,
    )


def _estimate(recipe: Recipe, inputs: Inputs, done: Mapping[str, Result]) -> tuple[tuple[StagePlan, ...], int]:
    """Return what each stage needs, and the bytes of the output."""
    import_torch_and_transformers()
    from bmm.kinds.registry import kind_of

    with Checkpoint.open(Path(inputs.base.path)) as base:
        outline = outline_of(base, kind_of(inputs.experts[0].task["kind"]).architecture)
    tokens = [outline.tokens(expert.task, Path(expert.model.path)) for expert in inputs.experts]
    return estimate_stages(recipe, outline, tokens, calibration_rows(recipe), done), outline.stored_bytes


def require_fit(plan: Plan, recipe: Recipe) -> None:
    """Refuse a plan that cannot fit, naming the worst shortage and what to change.

    Raises:
        OutputError: too little disk for the store or the output.
        RecipeError: too little memory, in all or for a worker.
    """
    shortages: list[tuple[float, Exception]] = []
    store, store_free = f"the store {plan.store}", plan.store_free
    if store_free is None:
        store, store_free = f"the folder {plan.work}, for copies of the store {plan.store},", plan.work_free
    for what, needed, free, remedy in (
        (store, plan.disk_bytes, store_free, "name another disk with --store or prune it"),
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
    if (worker := worker_shortage(plan.stages, recipe)) is not None:
        shortages.append(worker)
    if shortages:
        raise max(shortages, key=lambda shortage: shortage[0])[1]
