"""The nightly flow: one night as a Prefect flow, its steps and the merge's stages as tasks.

Deployed with a schedule by `bmm deploy`, run by hand by `bmm nightly`. A state's name says how the night ended.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.states import Completed

from bmm.nightly.resolved import Resolved
from bmm.pipeline import Merge
from bmm.report.night import headline
from bmm.stages.request import Request, Result
from bmm.store import Store
from flows.dead_runs import running
from flows.merge import execute_task
from flows.night import Found, night
from tasks.models import register
from tasks.pages import show_end, show_figures, show_inputs
from tasks.record import show_summary, track_merge
from tasks.step import perform_step
from tasks.telling import tell_people

Answer = TypeVar("Answer")
_HOURS = float(os.environ.get("BMM_NIGHT_HOURS") or 12)


class PrefectHands:
    """Carries out a night's steps as tasks of a flow run.

    Args:
        run: the flow run's id, which its retries keep.
    """

    track = staticmethod(track_merge)

    def __init__(self, run: str) -> None:
        self.run = run

    def step(self, name: str, function: Callable[[], Answer]) -> Answer:
        """Carry out a step as a task with retries."""
        return perform_step(name, function)

    def execute(self, store: Store, request: Request) -> Result:
        """Execute a stage as its task."""
        return execute_task(store, request)

    def show_inputs(self, resolved: Resolved) -> None:
        """Put what the night works on on the run's page."""
        show_inputs(resolved)

    def show_merge(self, merge: Merge) -> None:
        """Put the merge's outcome and figures on the run's page."""
        show_summary(merge)
        show_figures(merge)

    def end(self, found: Found, wanted: bool) -> None:
        """Put the night's end on the run's page, and tell people."""
        show_end(found)
        if wanted and (problem := tell_people(found)):
            get_run_logger().warning("nobody was told: %s", problem)


@flow(
    name="nightly",
    description="Merge what has changed, and promote what is better.",
    persist_result=False,
    log_prints=False,
    timeout_seconds=_HOURS * 3600,
)
def nightly_flow(recipe: str, store: str | None = None, fresh: bool = False) -> State[Found]:
    """Carry out one night.

    Args:
        recipe: the recipe's file.
        store: where the artefact store is; else `BMM_STORE`, else the user's cache folder.
        fresh: compute every stage anew.
    """
    register()
    opened = Store.open(store, fresh=fresh)
    opened.check()
    with running(opened) as run:
        found = night(Path(recipe), opened, PrefectHands(run))
    return Completed(name=found["outcome"].capitalize(), message=headline(found), data=found)
