"""The Grams stage as a Prefect task."""

from __future__ import annotations

from tasks.stage import stage_task

grams = stage_task("grams", "Collect every expert's Gram matrices over its own calibration rows.", retries=2)
