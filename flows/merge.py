"""The merge flow: the pipeline's stages as Prefect tasks, then the output folder, then the tracker."""

from __future__ import annotations

from typing import Any

from prefect import flow, get_run_logger

from bmm.pipeline import run
from bmm.recipe import Recipe
from bmm.stages.request import Request, Result
from bmm.store import Store
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
    asked = Recipe.from_mapping(recipe, folder=folder)
    opened = Store.open(store, fresh=fresh)

    def execute_task(store: Store, request: Request) -> Result:
        return execute(TASKS[request.stage], store, request)

    merged = run(asked, opened, execute_task)
    show_summary(merged)
    outcome = track_or_explain(opened, merged, enabled=asked.tracking.enabled, log=track_merge)
    if outcome.tracking_error:
        get_run_logger().warning("not everything was logged to MLflow: %s", outcome.tracking_error)
    if outcome.sent_later:
        get_run_logger().info("%d records of earlier merges were logged to MLflow", outcome.sent_later)
    return outcome
