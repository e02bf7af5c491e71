"""What Prefect must be told before it is imported: no outside traffic, patience at start, quiet on the terminal.

Everything is a default: a variable that the user has set stays as it is.
"""

from __future__ import annotations

import os

_DEFAULTS = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
    "PREFECT_TELEMETRY_ENABLE_RESOURCE_METRICS": "false",
    # 20 seconds, Prefect's own default, is too short on a busy machine.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    # In memory, Prefect's own default, what running nights hold would be forgotten by a server that is restarted: they
    # would be ended, or, if they were killed meanwhile, keep every night after them waiting for ever.
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    # The server gets every line of a flow's log; the terminal belongs to the progress bars.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
}


def set_defaults() -> None:
    """Set Prefect's environment; call it before anything imports prefect."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
