"""What a night puts on its flow run's page: what it works on, its figures, and how it ended."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping
from typing import Any

from prefect.artifacts import create_markdown_artifact, create_table_artifact

from bmm.nightly.resolved import Resolved
from bmm.pipeline import Merge
from bmm.report.night import night_markdown


def show_inputs(resolved: Resolved) -> None:
    """Show every model that the night works on, by version and digest, and every one that it leaves out."""
    create_table_artifact(resolved.rows(), key="bmm-night-inputs", description="What this night works on")


def show_figures(merge: Merge) -> None:
    """Show the report's figures, each as an image within the text."""
    # A night without a merge draws nothing, and need not wait for what draws.
    from bmm.report.figures import pngs

    shown = [
        f"![{name}](data:image/png;base64,{b64encode(drawn).decode('ascii')})"
        for name, drawn in pngs(merge.document).items()
    ]
    if shown:
        create_markdown_artifact("\n\n".join(shown), key="bmm-figures", description="The report's figures")


def show_end(found: Mapping[str, Any]) -> None:
    """Show how the night ended, with a link to MLflow, which has the report too, where it is a server."""
    text = night_markdown(found)
    mlflow = found.get("mlflow")
    if mlflow and mlflow["uri"].startswith("http"):
        text += f"\n\n[The MLflow run]({mlflow['uri']}/#/runs/{mlflow['run_id']})"
    create_markdown_artifact(text, key="bmm-night", description="How the night ended")
