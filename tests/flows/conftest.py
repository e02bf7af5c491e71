"""A real Prefect server for the session, the `bmm` command in this process, and what both leave to look at."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from answers import TOLD, Answer
from mlflow_tables import tables  # noqa: F401 - a fixture

from flows.prefect_settings import set_defaults


@dataclass(frozen=True)
class Server:
    """A running Prefect server."""

    url: str
    client: httpx.Client

    def find(self, what: str, **filters: Any) -> list[dict[str, Any]]:
        """Return the server's flow runs, task runs, artifacts or logs, newest first where it can sort them."""
        answer = self.client.post(f"{self.url}/{what}/filter", json={"limit": 200, **filters})
        answer.raise_for_status()
        found: list[dict[str, Any]] = answer.json()
        return found

    def last_flow_run(self) -> dict[str, Any]:
        """Return the flow run that started last."""
        return self.find("flow_runs", sort="START_TIME_DESC")[0]

    def task_runs(self, flow_run: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the task runs of a flow run in the order in which they were made."""
        # Task runs reach the database as events, a moment after the client has gone on.
        deadline = time.monotonic() + 180
        while True:
            found = self.find("task_runs", flow_runs={"id": {"any_": [flow_run["id"]]}})
            done = found and all(run["state_type"] in ("COMPLETED", "FAILED") for run in found)
            if (done and (flow_run["state_type"] == "FAILED" or found_names(found) >= {"publish"})) or (
                time.monotonic() > deadline
            ):
                return sorted(found, key=lambda run: str(run["expected_start_time"]))
            time.sleep(0.2)


def found_names(runs: list[dict[str, Any]]) -> set[str]:
    """Return the names of some task runs."""
    return {run["name"] for run in runs}


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server process for the session, with its own home."""
    set_defaults()
    home = tmp_path_factory.mktemp("prefect-server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (home / "server.log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, "PREFECT_HOME": str(home)}, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 180
        # A client of each question's own would read all certificates anew, with a core that the server wants.
        with httpx.Client(timeout=60) as client:
            while True:
                try:
                    client.get(f"{url}/health", timeout=5).raise_for_status()
                    break
                except httpx.HTTPError:
                    assert process.poll() is None, (home / "server.log").read_text()
                    assert time.monotonic() < deadline, (home / "server.log").read_text()
                    time.sleep(0.2)
            yield Server(url, client)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture
def on_server(prefect_server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Point this process, and those that it starts, to the session's server."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    monkeypatch.setenv("PREFECT_API_URL", prefect_server.url)
    with temporary_settings({PREFECT_API_URL: prefect_server.url}):
        yield prefect_server


@pytest.fixture
def bmm_here() -> Callable[..., Answer]:
    """Run the command line in this process; an exception that is not an exit code escapes."""
    from typer.testing import CliRunner

    from flows.cli import app

    def run(*words: object) -> Answer:
        found = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
        return Answer(found.exit_code, found.stdout, found.stderr)

    return run


@pytest.fixture
def bmm_process() -> Callable[..., Answer]:
    """Run the command line in a process of its own; `before` is Python that runs first, `after` runs last."""

    def run(*words: object, before: str = "", after: str = "", **environment: str) -> Answer:
        program = f"{before}\nfrom flows.cli import app\ntry:\n    app()\nfinally:\n    pass\n"
        for line in after.splitlines():
            program += f"    {line}\n"
        found = subprocess.run(
            [sys.executable, "-c", program, *(str(word) for word in words)],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )
        return Answer(found.returncode, found.stdout, found.stderr)

    return run


@pytest.fixture
def done(finished: tuple[Path, Path, Any], tmp_path: Path) -> tuple[Path, Path]:
    """A finished merge that a test may change: its folder and its store."""
    folder, store, _ = finished
    shutil.copytree(folder, tmp_path / "pico")
    shutil.copytree(store, tmp_path / "store")
    return tmp_path / "pico", tmp_path / "store"


@pytest.fixture(scope="session")
def model_files() -> Callable[[Path], dict[str, bytes]]:
    """Return a function that reads every file of an output that must not depend on the run."""

    def read(output: Path) -> dict[str, bytes]:
        return {
            path.relative_to(output).as_posix(): path.read_bytes()
            for path in sorted(output.rglob("*"))
            if path.is_file() and path.name not in TOLD[:2] and path.relative_to(output).as_posix() != TOLD[2]
        }

    return read
