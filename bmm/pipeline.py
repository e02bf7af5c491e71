"""One merge from recipe to output folder: the order of the stages, in one place.

`run` does not care how a stage is executed: in this process (`merge`), or as an orchestrator's task (`flows.merge`).
Either way the same plain functions do the work, to the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from bmm.document import build_document
from bmm.errors import ArtefactDamagedError
from bmm.imports import import_torch_and_transformers
from bmm.publication import export
from bmm.recipe import Recipe
from bmm.requests import Requests
from bmm.runs import keep_run
from bmm.sources import Inputs, fingerprint_inputs
from bmm.stages.request import Request, Result, Stage, Work, perform
from bmm.store import Reference, Store
from bmm.stores.at_work import at_work

STAGES = ("experts", "task-vectors", "grams", "anchor", "search", "evaluate", "publish")
_ANCHOR_ALONE = ("experts", "publish")

Execute = Callable[[Store, Request], Result]


def stages_of(recipe: Recipe) -> tuple[str, ...]:
    """Return the stages that a recipe asks for, in their order."""
    return _ANCHOR_ALONE if recipe.anchor_alone else STAGES


@dataclass(frozen=True)
class Merge:
    """A finished merge: where it is and all that is known of it."""

    output: Path
    document: dict[str, Any]
    results: dict[str, Result]
    record: Reference | None
    """What the store keeps of it (`bmm.runs`); None where the store may only be read."""

    @property
    def share_of_experts(self) -> float | None:
        """The merged model's mean test metric over the experts' mean; None without test rows."""
        measured = self.document["metrics"].get("test")
        return None if measured is None else float(measured["mean"]["share_of_experts"]["merged"])


def merge(recipe: Recipe, *, store: str | PathLike[str] | None = None, fresh: bool = False) -> Merge:
    """Run a whole merge in this process, without an orchestrator or a tracker.

    Finished stages are taken from the store. A script that calls this needs `if __name__ == "__main__":` around it,
    because the Gram workers are processes that import the script.

    Args:
        recipe: what to merge.
        store: folder or s3:// address of the artefact store; else `BMM_STORE`, else the user's cache folder.
        fresh: compute every stage anew.

    Raises:
        UserError: the recipe or something that it names cannot be used.
        BMMError: the merge failed for another reason.
    """
    opened = Store.open(store, fresh=fresh)
    opened.check()
    return run(recipe, opened, perform_here)


def run(recipe: Recipe, store: Store, execute: Execute, *, inputs: Inputs | None = None) -> Merge:
    """Run every stage through `execute`, then write the output folder."""
    inputs = inputs or fingerprint_inputs(recipe)
    with at_work(store):
        results = run_stages(recipe, inputs, store, execute, stages_of(recipe))
        work = Work(store)
        document = build_document(recipe, inputs, results, work)
        output = recipe.resolve(recipe.output)
        export(work.read(results["publish"].reference("model")), document, output)
        return Merge(output, document, results, keep_run(store, document, results))


def run_stages(
    recipe: Recipe, inputs: Inputs, store: Store, execute: Execute, stages: tuple[str, ...], *, grams: bool = False
) -> dict[str, Result]:
    """Run some stages in their order and return their results; with `grams` those are made whoever reads them.

    An artefact that is found damaged by a later stage (it was whole when its own stage looked) has its stage run
    again, once.
    """
    requests = Requests(recipe, inputs, grams=grams)
    for attempt in (1, 2):
        results: dict[str, Result] = {}
        try:
            for stage in stages:
                results[stage] = execute(store, requests.build(stage, results))
        except ArtefactDamagedError:
            if attempt == 2:
                raise
            continue
        break
    return results


def perform_here(store: Store, request: Request) -> Result:
    """Execute one stage in this process."""

    def load() -> Stage:
        # The stages import torch and transformers; finding out that everything is cached does not.
        import_torch_and_transformers()
        from bmm.stages.registry import STAGES as FUNCTIONS

        return FUNCTIONS[request.stage]

    return perform(load, store, request)
