"""Running a flow on the Prefect server that is configured, or on a temporary one of this command."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from bmm.errors import BMMError
from bmm.progress import progress
from flows.orphans import end_orphans

Answer = TypeVar("Answer")


def with_prefect(run: Callable[[], Answer]) -> Answer:
    """Run a flow; `run` imports and calls it.

    Raises:
        BMMError: the server does not answer.
    """
    # Before Prefect may start a server of its own.
    end_orphans()
    try:
        with progress("connecting to Prefect", 1) as bar:
            from prefect.client.orchestration import get_client

            # Starts a temporary server where none is configured.
            get_client(sync_client=True)
            bar.advance()
        return run()
    except RuntimeError as error:
        # Prefect has no type for a server that is not there, only these words.
        if not str(error).startswith(("Failed to reach API", "Timed out while attempting to connect")):
            raise
        raise BMMError(
            "the Prefect server does not answer; start it, correct PREFECT_API_URL (unset, a temporary server is "
            "started), or run with --no-server"
        ) from error
