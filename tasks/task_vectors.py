"""The task vectors stage as a Prefect task."""

from __future__ import annotations

from tasks.stage import stage_task

task_vectors = stage_task(
    "task-vectors", "Read every weight once: refuse what is not finite, measure each task vector."
)
