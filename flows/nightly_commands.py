"""What the commands of nights do: each returns plain JSON values, and raises `BMMError` when it cannot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from flows.commands import opened_store
from flows.connecting import with_prefect


def nightly(path: Path, store: str | None, *, fresh: bool, server: bool) -> dict[str, Any]:
    """Carry out one night by hand, as a Prefect flow or in this process."""
    from bmm.nightly.resolved import place_of
    from tasks.models import register

    register()
    # A file that is no recipe is refused before a server starts.
    place_of(path)
    opened = opened_store(store, fresh=fresh)
    if not server:
        from flows.night import Here, night

        return night(path, opened, Here())

    def run() -> dict[str, Any]:
        from flows.nightly import nightly_flow

        # Prefect gives what the flow's last state holds.
        found: Any = nightly_flow(str(path.resolve()), opened.location, fresh)
        return dict(found)

    return with_prefect(run)


def deploy(
    path: Path, store: str | None, pool: str, *, serve: bool, ready: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Deploy a recipe's nights; with `serve`, to a server of this machine, and work for it until Ctrl-C.

    `ready` is called with what was deployed before the work begins.
    """
    from flows import deploy as deployment
    from tasks.models import register

    register()
    opened = opened_store(store)
    if not serve:
        deployment.require_server()
        return deployment.deploy(path, opened, pool)
    with deployment.served(opened, pool) as work:
        found = deployment.deploy(path, opened, pool)
        ready(found)
        work()
    return found


def promote(path: Path, store: str | None, version: str | None, who: str | None, why: str) -> dict[str, Any]:
    """Make a version the champion by hand."""
    from flows.standing import promote as move

    return move(path, opened_store(store), version, who, why)


def roll_back(path: Path, store: str | None, who: str | None, why: str) -> dict[str, Any]:
    """Make the champion's predecessor the champion again."""
    from flows.standing import roll_back as move

    return move(path, opened_store(store), who, why)
