"""The load experts stage as a Prefect task."""

from __future__ import annotations

from tasks.stage import stage_task

load_experts = stage_task("experts", "Compare the checkpoints, find the linear maps, read and copy the rows.")
