"""The stages by name, in the order in which they run."""

from __future__ import annotations

from bmm.stages.anchor import anchor
from bmm.stages.evaluate import evaluate
from bmm.stages.experts import load_experts
from bmm.stages.grams import grams
from bmm.stages.publish import publish
from bmm.stages.request import Stage
from bmm.stages.search import run_search
from bmm.stages.task_vectors import task_vectors

STAGES: dict[str, Stage] = {
    "experts": load_experts,
    "task-vectors": task_vectors,
    "grams": grams,
    "anchor": anchor,
    "search": run_search,
    "evaluate": evaluate,
    "publish": publish,
}
