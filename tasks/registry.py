"""The stages' tasks by stage name."""

from __future__ import annotations

from tasks.anchor import anchor
from tasks.evaluate import evaluate
from tasks.experts import load_experts
from tasks.grams import grams
from tasks.publish import publish
from tasks.search import search
from tasks.stage import StageTask
from tasks.task_vectors import task_vectors

TASKS: dict[str, StageTask] = {
    "experts": load_experts,
    "task-vectors": task_vectors,
    "grams": grams,
    "anchor": anchor,
    "search": search,
    "evaluate": evaluate,
    "publish": publish,
}
