"""A stage as a Prefect task: cached by the stage's key, its result a small JSON value, its artefacts verified.

Prefect's cache says that a task has run; only the store can say that what it made is still there. So a `Cached`
state is believed after the artefacts behind it have been checked, and the task runs again if they are not whole.
Stages named in `tasks/` are built here; their order is `bmm.pipeline`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from prefect import Task, get_run_logger, task
from prefect.cache_policies import CacheKeyFnPolicy
from prefect.client.schemas.objects import State
from prefect.context import TaskRunContext

from bmm.digest import digest_text
from bmm.pipeline import perform_here
from bmm.stages.request import Request, Result, verified
from bmm.store import Store
from tasks.step import worth_retrying

StageTask = Task[[str, dict[str, Any], bool], dict[str, Any]]
AfterStage = Callable[[Store, Result], None]


def stage_task(stage: str, description: str, *, retries: int = 0, after: AfterStage | None = None) -> StageTask:
    """Return the Prefect task of one stage.

    Args:
        stage: its name in `bmm.pipeline.STAGES`.
        description: what the Prefect page says of it.
        retries: how often a fault that is not the user's is tried again.
        after: publishes Prefect artifacts about a result.
    """

    def run_stage(store: str, request: dict[str, Any], fresh: bool) -> dict[str, Any]:
        opened = Store.open(store, fresh=fresh)
        result = perform_here(opened, Request.from_json(request))
        get_run_logger().info("%s: %s in %.1f s", result.stage, result.state, result.seconds)
        if after is not None:
            after(opened, result)
        return result.to_json()

    delays: list[float] = [5.0 * 4**attempt for attempt in range(retries)]
    as_task = task(
        name=stage,
        description=description,
        task_run_name=stage,
        cache_policy=CacheKeyFnPolicy(cache_key_fn=_cache_key),
        persist_result=True,
        result_serializer="json",
        retries=retries,
        retry_delay_seconds=delays,
        retry_condition_fn=worth_retrying,
    )
    return as_task(run_stage)


def execute(stage: StageTask, store: Store, request: Request) -> Result:
    """Run a stage's task and return its result, whose artefacts are there and whole."""
    started = time.perf_counter()
    arguments = (store.location, request.to_json(), store.fresh)
    state = stage.with_options(refresh_cache=store.fresh)(*arguments, return_state=True)
    result = Result.from_json(_value(state))
    if state.name != "Cached":
        return result
    if not verified(store, result):
        state = stage.with_options(refresh_cache=True)(*arguments, return_state=True)
        return Result.from_json(_value(state))
    return replace(result, state="cached", seconds=time.perf_counter() - started)


def _value(state: State[Any]) -> Mapping[str, Any]:
    value: Mapping[str, Any] = state.result()
    return value


def _cache_key(_: TaskRunContext, parameters: dict[str, Any]) -> str:
    # References are names inside one store, so its place belongs to the key.
    request = Request.from_json(parameters["request"])
    return f"bmm-{request.stage}-{request.key}-{digest_text(parameters['store'])[:16]}"
