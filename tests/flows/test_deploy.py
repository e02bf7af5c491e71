"""`bmm deploy` on a real server: what is there afterwards, and that nights are really scheduled and really run."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from answers import Answer
from nights import edit, found_experts

Command = Callable[..., Answer]
pytestmark = pytest.mark.slow


@dataclass
class Serving:
    """A `bmm deploy --serve` at work."""

    process: subprocess.Popen[bytes]
    client: httpx.Client
    log: Path

    def wait_for(self, found: Callable[[], Any]) -> Any:
        """Return what is found as soon as there is something."""
        deadline = time.monotonic() + 240
        while True:
            with suppress(httpx.TransportError):
                if answer := found():
                    return answer
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.3)

    def interrupt(self) -> int:
        """Press Ctrl-C and return the exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(120)


@contextmanager
def serving(recipe: Path, store: Path, place: Path) -> Iterator[Serving]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home = {"PREFECT_HOME": str(place), "PREFECT_RESULTS_LOCAL_STORAGE_PATH": str(place / "storage")}
    environment = {**os.environ, **home, "PREFECT_SERVER_API_PORT": str(port)}
    words = [
        sys.executable,
        "-c",
        "from flows.cli import main; main()",
        "deploy",
        str(recipe),
        "--serve",
        "--store",
        str(store),
    ]
    log = place.with_suffix(".log")
    with log.open("wb") as sink, subprocess.Popen(words, stdout=sink, stderr=sink, env=environment) as process:
        try:
            # One for all questions: each new one reads all certificates anew.
            with httpx.Client(base_url=f"http://127.0.0.1:{port}/api", timeout=60) as client:
                yield Serving(process, client, log)
        finally:
            process.kill()


def test_a_deployed_night_is_scheduled_and_run(pico: Path, tmp_path: Path) -> None:
    schedule = {"cron": "30 2 * * *", "timezone": "Europe/Berlin"}
    recipe = found_experts(pico, model="team", schedule=schedule, gate={"gain": -1})
    edit(recipe, regression={"mode": "none"}, anchor={"method": "average"}, search=None, evaluation=None)
    store = tmp_path / "store"
    with serving(recipe, store, tmp_path / "prefect") as at:

        def find(what: str, **filters: Any) -> list[dict[str, Any]]:
            answer: list[dict[str, Any]] = at.client.post(f"/{what}/filter", json=filters).json()
            return answer

        at.wait_for(lambda: b"until Ctrl-C" in at.log.read_bytes())
        assert "deployed nightly/team, merge-on-demand/team, grams/team, store-prune/team" in at.log.read_text()
        found = {one["tags"][1]: one for one in find("deployments")}
        night = found["nightly"]
        assert night["parameters"] == {"recipe": str(recipe), "store": str(store)}
        assert night["concurrency_options"]["collision_strategy"] == "ENQUEUE"
        assert (night["global_concurrency_limit"]["limit"], night["work_pool_name"]) == (1, "bmm")
        assert {name: [one["schedule"]["cron"] for one in entry["schedules"]] for name, entry in found.items()} == {
            "nightly": ["30 2 * * *"],
            "on-demand": [],
            "grams": [],
            "housekeeping": ["0 13 * * 0"],
        }
        # One wrong version of a dependency, and a server that looks healthy schedules nothing at all.
        runs = at.wait_for(lambda: find("flow_runs", deployments={"id": {"any_": [night["id"]]}}))
        assert {run["state_name"] for run in runs} == {"Scheduled"}
        assert {run["expected_start_time"][11:16] for run in runs} <= {"00:30", "01:30"}

        made = at.client.post(f"/deployments/{night['id']}/create_flow_run", json={}).json()

        def ended() -> dict[str, Any] | None:
            (run,) = find("flow_runs", flow_runs={"id": {"any_": [made["id"]]}})
            return run if run["state_type"] in ("COMPLETED", "FAILED", "CRASHED") else None

        run = at.wait_for(ended)
        assert run["state_name"] == "Promoted", run["state"]["message"]
        assert (pico / "merged" / "merge.json").is_file()
        # What a night holds while it runs is not forgotten by a server that is restarted.
        assert (tmp_path / "prefect" / "concurrency_leases" / "expirations.json").is_file()
        started = psutil.Process(at.process.pid).children(recursive=True)
        assert len(started) >= 2
        assert at.interrupt() == 0, at.log.read_text()
        assert psutil.wait_procs(started, timeout=60)[1] == []


def test_without_a_server_there_is_nothing_to_deploy_to(pico: Path, bmm_process: Command) -> None:
    said = bmm_process("deploy", found_experts(pico), "--store", pico / "store")
    assert said.code == 2
    (line,) = said.complaints
    assert "PREFECT_API_URL" in line
    assert "--serve" in line


def test_what_could_not_be_merged_is_not_deployed(pico: Path, on_server: Any, bmm_here: Command) -> None:
    recipe = found_experts(pico, schedule={"timezone": "Europe/Atlantis"})
    said = bmm_here("deploy", recipe, "--store", pico / "store")
    assert (said.code, "'nightly.schedule.timezone': there is no such time zone" in said.err) == (2, True)
    edit(recipe, nightly={}, base_model="./nowhere")
    said = bmm_here("deploy", recipe, "--store", pico / "store")
    assert (said.code, "base_model" in said.err) == (2, True)
