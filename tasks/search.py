"""The search stage as a Prefect task."""

from __future__ import annotations

from tasks.stage import stage_task

search = stage_task("search", "Search the prior's strength and the assembly scale per module group.")
