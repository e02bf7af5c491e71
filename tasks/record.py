"""What a finished merge leaves with others: the MLflow record, as a task, and the summary on the flow run's page.

Effects on somebody else's server, so they are never cached.
"""

from __future__ import annotations

from typing import Any

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from bmm.pipeline import Merge
from bmm.store import Store
from tasks.tracking import Tracked, track


@task(
    name="track", description="Log the merge to MLflow, once.", cache_policy=NO_CACHE, retries=1, retry_delay_seconds=5
)
def track_merge(store: Store, merge: Merge) -> Tracked:
    """Log a finished merge to MLflow."""
    return track(store, merge)


def show_summary(merge: Merge) -> None:
    """Put the merge's outcome on the flow run's page."""
    said = "The merged model was not measured: the recipe names no test rows."
    if merge.share_of_experts is not None:
        mean: dict[str, Any] = merge.document["metrics"]["test"]["mean"]
        low, high = mean["intervals"]["share_of_experts"]["merged"]
        said = (
            f"The merged model keeps **{merge.share_of_experts:.1%}** ({low:.1%} to {high:.1%}) of its experts' mean "
            "test score."
        )
    create_markdown_artifact(
        f"{said}\n\nIt lies in `{merge.output}`, with `report.html` beside it.",
        key="bmm-merge",
        description="Outcome of the merge",
    )
