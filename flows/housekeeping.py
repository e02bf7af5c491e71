"""Clearing up the store as a flow: what `bmm store prune` does, by a schedule."""

from __future__ import annotations

from typing import Any

from prefect import flow, get_run_logger

from flows import store_commands


@flow(
    name="store-prune", description="Remove what nobody has used for a while.", persist_result=False, log_prints=False
)
def prune_flow(
    store: str | None = None,
    older_than_days: float | None = 30.0,
    keep_runs: int | None = None,
    max_bytes: str | None = None,
) -> dict[str, Any]:
    """Clear up the store.

    Args:
        store: where the artefact store is; else `BMM_STORE`, else the user's cache folder.
        older_than_days: what was last used longer ago goes.
        keep_runs: what only merges older than the last so many were made from goes.
        max_bytes: what was used longest ago goes, until the rest takes no more, for example 200GiB.
    """
    found = store_commands.store_prune(store, older_than_days, keep_runs, max_bytes, dry_run=False, copies=False)
    get_run_logger().info("%s artefacts removed, %s bytes", found["artefacts"], found["bytes"])
    return found
