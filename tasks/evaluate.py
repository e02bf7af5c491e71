"""The evaluate stage as a Prefect task, with its tables on the run's page."""

from __future__ import annotations

from typing import Any

from prefect.artifacts import create_table_artifact

from bmm.stages.request import Result
from bmm.store import Store
from tasks.stage import stage_task


def _show(store: Store, result: Result) -> None:
    found = store.read(result.reference("evaluation")).read_json("evaluation.json")
    if "test" not in found["metrics"]:
        return
    tasks: list[dict[str, Any]] = [
        {"task": task, **{name: entry[name] for name in ("base", "expert", "anchor", "merged")}}
        for task, entry in sorted(found["metrics"]["test"].items(), key=lambda item: item[0] == "mean")
    ]
    create_table_artifact(tasks, key="bmm-test-scores", description="Score on the test rows, by each task's metric")
    methods = [
        {"method": row["method"], **row["share_of_experts"], "mean score": row["mean"]} for row in found["methods"]
    ]
    create_table_artifact(methods, key="bmm-methods", description="Share of the experts' mean test score")


evaluate = stage_task(
    "evaluate", "Measure base, experts, anchors and merged model on the test rows, once.", after=_show
)
