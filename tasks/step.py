"""A step of a night as a Prefect task: never cached, tried again with longer and longer pauses where that may help."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun

from bmm.errors import ModelAwayError, UserError

Answer = TypeVar("Answer")
PAUSES_SECONDS = [10.0, 60.0, 300.0]


def perform_step(name: str, function: Callable[[], Answer]) -> Answer:
    """Carry out a step that may touch the network, as a task run of its own.

    Args:
        name: the task run's.
        function: what to do; may be done again.
    """
    made: Task[[], Answer] = task(
        name=name,
        task_run_name=name,
        cache_policy=NO_CACHE,
        persist_result=False,
        retries=len(PAUSES_SECONDS),
        retry_delay_seconds=PAUSES_SECONDS,
        retry_jitter_factor=0.2,
        retry_condition_fn=worth_retrying,
    )(function)
    return made()


def worth_retrying(_task: Any, _run: TaskRun, state: State[Any]) -> bool:
    """Say whether what failed may go well another time: nothing that is the user's mistake."""
    try:
        state.result()
    except ModelAwayError:
        return True
    except UserError:
        return False
    except Exception:
        return True
    return False
