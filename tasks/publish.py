"""The publish stage as a Prefect task."""

from __future__ import annotations

from tasks.stage import stage_task

publish = stage_task("publish", "Put the merged model together as an ordinary Hugging Face folder.")
