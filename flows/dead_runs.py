"""Flow runs whose process was killed are marked as crashed, not left running for ever.

A flow run holds a lock on a file of its own for as long as it lives, which the kernel lets go of with the process; so
a run that Prefect believes to be running, and whose lock is free, is dead. A run that was killed before it came so far
is known by the process that its worker noted. Runs of other machines are left to those.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowFilter, FlowFilterName, FlowRunFilter, FlowRunFilterState
from prefect.client.schemas.filters import FlowRunFilterStateType as StateTypes
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.context import FlowRunContext
from prefect.states import Crashed

from bmm.disk import explained
from bmm.errors import OutputError
from bmm.store import Store
from bmm.stores.locks import locked_file

_FLOWS = ["nightly", "merge", "merge-on-demand", "grams", "store-prune"]


@contextmanager
def running(store: Store) -> Iterator[str]:
    """Mark the dead, be known as alive for the length of the block, and yield this flow run's id."""
    context = FlowRunContext.get()
    assert context is not None  # noqa: S101 - it is a flow that calls this
    assert context.flow_run is not None  # noqa: S101
    run = str(context.flow_run.id)
    with alive(store, run):
        for name in end_dead_runs(store):
            get_run_logger().warning("the flow run %s was killed; it is marked as crashed", name)
        yield run


@contextmanager
def alive(store: Store, run: str) -> Iterator[None]:
    """Hold a flow run's lock for the length of the block."""
    path = _path(store, run)
    with ExitStack() as stack:
        with suppress(OutputError), explained(store.root):
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked_file(path, wait=False))
            stack.callback(path.unlink, missing_ok=True)
        yield


def end_dead_runs(store: Store) -> list[str]:
    """Mark runs that are said to be running and are dead as crashed; return their names."""
    ended = []
    with get_client(sync_client=True) as client:
        found = client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=_FLOWS)),
            flow_run_filter=FlowRunFilter(
                state=FlowRunFilterState(type=StateTypes(any_=[StateType.RUNNING, StateType.CANCELLING]))
            ),
            limit=200,
        )
        for run in found:
            if _is_dead(store, run):
                state: State[None] = Crashed(
                    message="The process was killed. A retry of the run carries on where it stopped."
                )
                client.set_flow_run_state(run.id, state, force=True)
                _path(store, str(run.id)).unlink(missing_ok=True)
                ended.append(run.name)
    return ended


def _is_dead(store: Store, run: FlowRun) -> bool:
    path = _path(store, str(run.id))
    if path.exists():
        with locked_file(path, wait=False) as free:
            return free
    host, _, number = (run.infrastructure_pid or "").rpartition(":")
    return host == socket.gethostname() and number.isdigit() and not psutil.pid_exists(int(number))


def _path(store: Store, run: str) -> Path:
    return store.root / "flow-runs" / f"{run}.lock"
