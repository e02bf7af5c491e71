"""Deploying a recipe's nights to a Prefect server: `deployments/prefect.yaml` with the recipe's own values.

With `--serve` a machine that has neither gets a server, on loopback, and a worker, until Ctrl-C. How a night goes is
`flows.night`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bmm.errors import BMMError, UserError
from bmm.nightly.resolved import place_of, resolve_night
from bmm.progress import progress
from bmm.store import Store

Found = dict[str, Any]
_PREFECT = [sys.executable, "-m", "prefect", "--no-prompt"]
_FILE = Path(__file__).resolve().parents[1] / "deployments" / "prefect.yaml"
# The first start makes the database, which takes minutes on a busy machine.
_START_SECONDS = 600.0
_STOP_SECONDS = 20.0


def deploy(path: Path, store: Store, pool: str) -> Found:
    """Deploy a recipe's flows to the server that is configured, and return what is there now.

    Raises:
        UserError: the recipe, or something that it names, cannot be used, or no server is configured.
        BMMError: Prefect refuses.
    """
    place = place_of(path)
    # What could not be merged tonight is told now.
    resolved = resolve_night(path)
    if not _FILE.is_file():
        raise UserError(f"there is no {_FILE}; deploy from a checkout of this project")
    schedule = place.nightly.schedule
    with progress("deploying", 2) as bar:
        _make_pool(pool)
        bar.advance()
        _prefect(
            ["deploy", "--all", "--prefect-file", str(_FILE)],
            BMM_NAME=place.model,
            BMM_RECIPE=str(path.resolve()),
            BMM_STORE=store.location,
            BMM_WORK_POOL=pool,
            BMM_CRON=schedule.cron,
            BMM_TIMEZONE=schedule.timezone,
        )
        bar.advance()
    return {
        "server": api_url(),
        "pool": pool,
        "model": place.model,
        "deployments": [f"{flow}/{place.model}" for flow in ("nightly", "merge-on-demand", "grams", "store-prune")],
        "schedule": schedule.model_dump(),
        "experts": [expert.name for expert in resolved.inputs.experts],
        "left_out": dict(resolved.left_out),
    }


def api_url() -> str | None:
    """Return the address of the server that is configured, None if there is none."""
    from prefect.settings import get_current_settings

    # Settings are read once in a process, and a server may have been started since.
    return os.environ.get("PREFECT_API_URL") or get_current_settings().api.url


def require_server() -> None:
    """Refuse to deploy to a server that would be gone a moment later.

    Raises:
        UserError: no server is configured.
    """
    if api_url() is None:
        raise UserError(
            "no Prefect server is configured; set PREFECT_API_URL to its address, or run one here with --serve"
        )


@contextmanager
def served(store: Store, pool: str) -> Iterator[Callable[[], None]]:
    """Run a Prefect server, unless one is configured, and for the length of the block have it used.

    Yields a function that runs a worker until Ctrl-C.
    """
    from flows.orphans import end_orphans

    end_orphans()
    started: list[subprocess.Popen[bytes]] = []
    logs = store.root / "serve"
    logs.mkdir(parents=True, exist_ok=True)

    def start(name: str, *words: str) -> subprocess.Popen[bytes]:
        with (logs / f"{name}.log").open("ab") as log:
            # A session of its own: Ctrl-C is for this command, which then stops them in their order.
            process = subprocess.Popen(  # noqa: S603 - Prefect's own command line
                [*_PREFECT, *words], stdout=log, stderr=log, start_new_session=True
            )
        started.append(process)
        return process

    def work() -> None:
        from flows.dead_runs import end_dead_runs

        # Nothing of an earlier worker of this machine is at work any more.
        end_dead_runs(store)
        worker = start("worker", "worker", "start", "--pool", pool, "--type", "process")
        try:
            code = worker.wait()
        except KeyboardInterrupt:
            return
        raise BMMError(f"the Prefect worker has ended ({code}); see {logs / 'worker.log'}")

    try:
        if api_url() is None:
            _use_local_server(
                lambda port: start("server", "server", "start", "--host", "127.0.0.1", "--port", port),
                logs / "server.log",
            )
        yield work
    finally:
        for process in reversed(started):
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _use_local_server(start: Callable[[str], subprocess.Popen[bytes]], log: Path) -> None:
    """Find or start a server on loopback, and make it the one that is configured for this process and its children."""
    from prefect.settings import get_current_settings

    port = str(get_current_settings().server.api.port)
    url = f"http://127.0.0.1:{port}/api"
    if not _answers(url):
        process = start(port)
        with progress("starting a Prefect server", 1) as bar:
            deadline = time.monotonic() + _START_SECONDS
            while not _answers(url):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise BMMError(
                        f"the Prefect server does not start at {url}; see {log}, or have it take another port with "
                        "PREFECT_SERVER_API_PORT"
                    )
                time.sleep(0.3)
            bar.advance()
    os.environ["PREFECT_API_URL"] = url


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:  # noqa: S310 - loopback
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _make_pool(pool: str) -> None:
    """Make a work pool of processes, unless there is one of this name."""
    try:
        _prefect(["work-pool", "inspect", pool])
    except BMMError:
        _prefect(["work-pool", "create", pool, "--type", "process"])


def _prefect(words: list[str], **environment: str) -> None:
    """Run Prefect's own command line.

    Raises:
        BMMError: it fails; the message is the last that it said.
    """
    done = subprocess.run(  # noqa: S603 - Prefect's own command line
        [*_PREFECT, *words], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        said = " ".join((done.stderr.strip() or done.stdout.strip()).split())
        raise BMMError(f"`prefect {' '.join(words[:2])}` failed: {said[-400:]}")
