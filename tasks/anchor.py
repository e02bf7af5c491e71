"""The anchor stage as a Prefect task."""

from __future__ import annotations

from tasks.stage import stage_task

anchor = stage_task("anchor", "Merge by the recipe's anchor method: the prior mean of the regression.")
