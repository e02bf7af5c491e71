"""The Gram stage alone as a flow: made ahead of the night, or on a cluster, for whichever recipe reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow

from bmm.store import Store
from flows import commands
from flows.dead_runs import running
from flows.merge import execute_task


@flow(name="grams", description="Make the experts' Gram matrices.", persist_result=False, log_prints=False)
def grams_flow(recipe: str, store: str | None = None, fresh: bool = False) -> dict[str, Any]:
    """Make the Gram matrices of a recipe's experts.

    Args:
        recipe: the recipe's file.
        store: where the artefact store is; else `BMM_STORE`, else the user's cache folder.
        fresh: compute them anew.
    """
    with running(Store.open(store)):
        return commands.grams(Path(recipe), store, fresh=fresh, execute=execute_task)
