"""The merge flow: the pipeline's stages as Prefect tasks, then the output folder, then the tracker.

`merge_flow` is what `bmm merge` runs, with a recipe as plain values; `merge_file_flow` is the same for a deployment,
which knows the recipe by its file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger

from bmm.pipeline import run
from bmm.recipe import Recipe
from bmm.stages.request import Request, Result
from bmm.store import Store
from flows.dead_runs import running
from tasks.models import register
from tasks.record import show_summary, track_merge
from tasks.registry import TASKS
from tasks.stage import execute
from tasks.tracking import Outcome, track_or_explain


@flow(name="merge", description="Merge expert models into one.", persist_result=False, log_prints=False)
def merge_flow(recipe: dict[str, Any], folder: str, store: str, fresh: bool = False) -> Outcome:
    """Run one merge.

    Args:
        recipe: the recipe as plain values.
        folder: the folder that its relative paths start from.
        store: where the artefact store is.
        fresh: compute every stage anew.
    """
    register()
    return _merge(Recipe.from_mapping(recipe, folder=folder), Store.open(store, fresh=fresh))


@flow(name="merge-on-demand", description="Merge expert models into one.", persist_result=False, log_prints=False)
def merge_file_flow(recipe: str, store: str | None = None, fresh: bool = False) -> Outcome:
    """Run the merge of a recipe's file.

    Args:
        recipe: the file.
        store: where the artefact store is; else `BMM_STORE`, else the user's cache folder.
        fresh: compute every stage anew.
    """
    register()
    opened = Store.open(store, fresh=fresh)
    opened.check()
    return _merge(Recipe.from_yaml(Path(recipe)), opened)


def execute_task(store: Store, request: Request) -> Result:
    """Execute one stage as its task."""
    return execute(TASKS[request.stage], store, request)


def _merge(recipe: Recipe, store: Store) -> Outcome:
    with running(store):
        merged = run(recipe, store, execute_task)
        show_summary(merged)
        outcome = track_or_explain(store, merged, enabled=recipe.tracking.enabled, log=track_merge)
    if outcome.tracking_error:
        get_run_logger().warning("not everything was logged to MLflow: %s", outcome.tracking_error)
    if outcome.sent_later:
        get_run_logger().info("%d records of earlier merges were logged to MLflow", outcome.sent_later)
    return outcome
