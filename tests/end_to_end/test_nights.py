"""Four nights as a team has them: a Prefect server, a worker, an MLflow server, and people who are told.

First everything is computed; then nothing; then one expert is better and one is broken; then an expert is new while
the worker is killed twice and the server restarted. Runs where `BMM_NIGHTS` is set (`make nights`): `real` trains the
demo's experts, `pico` takes tiny ones.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import psutil
import pytest
import yaml
from mlflow_server import free_port, running_mlflow
from nights import champion_of, copy_expert, found_experts, spoil

from bmm.store import Store

KIND = os.environ.get("BMM_NIGHTS", "")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not KIND, reason="runs by `make nights`")]
_PATIENCE = 900.0
Run = dict[str, Any]


def wait_for(found: Callable[[], Any], what: str) -> Any:
    """Return what is found as soon as there is something."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        with suppress(httpx.HTTPError):
            if answer := found():
                return answer
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.2)


class Team:
    """The services of a team, each in processes of its own, and what they know."""

    def __init__(self, place: Path, recipe: Path, environment: dict[str, str]) -> None:
        self.place, self.recipe, self.store = place, recipe, place / "store"
        self.environment = environment
        self.url = environment["PREFECT_API_URL"]
        self._port = self.url.rpartition(":")[2].removesuffix("/api")
        self._started: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *words: str) -> None:
        with (self.place / f"{name}.log").open("ab") as log:
            self._started[name] = subprocess.Popen(
                [sys.executable, "-m", "prefect", *words],
                stdout=log,
                stderr=log,
                env=self.environment,
                start_new_session=True,
            )

    def start_server(self) -> None:
        self.start("server", "server", "start", "--host", "127.0.0.1", "--port", self._port)
        wait_for(lambda: httpx.get(f"{self.url}/health", timeout=5).is_success, "the server")

    def start_worker(self) -> None:
        self.start("worker", "worker", "start", "--pool", "bmm")

    def kill(self, name: str) -> None:
        """SIGKILL a service and everything that it has started."""
        process = psutil.Process(self._started.pop(name).pid)
        family = [process, *process.children(recursive=True)]
        for one in family:
            with suppress(psutil.Error):
                one.kill()
        psutil.wait_procs(family, timeout=30)

    def stop(self) -> None:
        for name in list(self._started):
            self.kill(name)

    def bmm(self, *words: object) -> dict[str, Any]:
        command = [str(Path(sys.executable).with_name("bmm")), *(str(word) for word in words)]
        command += ["--store", str(self.store), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, env=self.environment, timeout=_PATIENCE)
        assert done.returncode == 0, done.stdout + done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def ask(self, what: str, body: dict[str, Any]) -> Any:
        """Post to the server, again where its SQLite was locked for a moment (503), as Prefect's own client does."""

        def answer() -> httpx.Response | None:
            said = httpx.post(f"{self.url}/{what}", json=body, timeout=60)
            return None if said.status_code == httpx.codes.SERVICE_UNAVAILABLE else said

        return wait_for(answer, what).raise_for_status().json()

    def find(self, what: str, **filters: Any) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.ask(f"{what}/filter", filters)
        return found

    def begin(self) -> str:
        """Have a night begin now; return the flow run's id."""
        (night,) = [one for one in self.find("deployments") if "nightly" in one["tags"]]
        # The key, so that a question asked again makes no second run.
        made = self.ask(f"deployments/{night['id']}/create_flow_run", {"idempotency_key": str(uuid4())})
        return str(made["id"])

    def state(self, run: str) -> Run:
        (found,) = self.find("flow_runs", flow_runs={"id": {"any_": [run]}})
        return found

    def end(self, run: str) -> Run:
        """Wait for a night to end."""

        def ended() -> Run | None:
            found = self.state(run)
            return found if found["state_type"] in ("COMPLETED", "FAILED", "CRASHED") else None

        found: Run = wait_for(ended, "the end of the night")
        return found

    def mark_the_dead(self) -> None:
        program = "import sys\nfrom bmm.store import Store\nfrom flows.dead_runs import end_dead_runs\n"
        program += "end_dead_runs(Store.open(sys.argv[1]))"
        subprocess.run([sys.executable, "-c", program, str(self.store)], env=self.environment, check=True)

    def retry(self, run: str) -> None:
        words = [sys.executable, "-m", "prefect", "flow-run", "retry", run]
        subprocess.run(words, env=self.environment, check=True, capture_output=True)

    def pages(self, run: str) -> dict[str, str]:
        found = self.find("artifacts", flow_runs={"id": {"any_": [run]}}, sort="CREATED_DESC")
        return {one["key"]: one["data"] for one in reversed(found)}

    def keys(self, kind: str) -> set[str]:
        return {entry.key for entry in Store.open(self.store).entries() if entry.kind == kind}

    def aliases(self) -> dict[str, str]:
        from mlflow import MlflowClient

        return dict(MlflowClient(self.environment["MLFLOW_TRACKING_URI"]).get_registered_model("team").aliases)


@contextmanager
def told() -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Run a web hook for the block; yields its port and what it was told."""
    messages: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            messages.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1], messages
        server.shutdown()


class Zoo:
    """The experts: `recipe` finds them, `better` makes one of them better, `add` puts another one there."""

    def __init__(self, folder: Path, source: Path, recipe: Path, names: list[str]) -> None:
        self.folder, self.source, self.recipe, self.names = folder, source, recipe, names

    def better(self) -> None:
        """Put the well-trained expert in the place of the poor one."""
        target = self.folder / "experts" / self.names[0]
        shutil.rmtree(target)
        shutil.copytree(self.source / "experts" / self.names[0], target)

    def poor(self) -> None:
        """Take an expert most of the way back to the base."""
        from safetensors.torch import load_file, save_file

        file = self.folder / "experts" / self.names[0] / "model.safetensors"
        base = load_file(self.folder / "base" / "model.safetensors")
        tensors = load_file(file)
        for name, tensor in tensors.items():
            key = name.partition(".")[2]
            if key in base and tensor.is_floating_point():
                tensors[name] = base[key] + 0.2 * (tensor - base[key])
        save_file(tensors, file, metadata={"format": "pt"})

    def add(self) -> None:
        """Bring an expert that was left away at first."""
        shutil.copytree(self.source / "experts" / self.names[-1], self.folder / "experts" / self.names[-1])


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    place = tmp_path_factory.mktemp("zoo")
    folder, source = place / "team", place / "source"
    if KIND == "real":
        from bmm.zoo.layout import prepare
        from bmm.zoo.learners import TextTraining
        from bmm.zoo.splits import SplitSizes

        sizes = SplitSizes(calibration=128, validation=100, test=200)
        prepare(source, training=TextTraining(steps=60), sizes=sizes, trials=4)
    else:
        from conftest import build_pico

        build_pico(source, 4)
    said = yaml.safe_load((source / "recipe.yaml").read_text(encoding="utf-8"))
    names = [expert["name"] for expert in said["experts"]]
    shutil.copytree(source, folder)
    shutil.rmtree(folder / "experts" / names[-1])
    task = said["experts"][0]["task"]
    shutil.copyfile(source / "recipe.yaml", folder / "recipe.yaml")
    recipe = found_experts(folder, model="team")
    found = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    found["experts"][0]["task"] |= {"max_length": task["max_length"]}
    for split in ("calibration", "validation", "test"):
        given = {**task[split], "data_files": task[split]["data_files"].replace(names[0], "{name}")}
        found["experts"][0]["task"][split] = given
    # A new task costs the others a little; and what tiny experts are worth is chance.
    found["nightly"]["gate"] = {"gain": -0.02, "loss": 0.2} if KIND == "real" else {"gain": -1, "loss": 1}
    found["search"] = {"trials": 4, "per": "model"}
    recipe.write_text(yaml.safe_dump(found, sort_keys=False), encoding="utf-8")
    made = Zoo(folder, source, recipe, names)
    made.poor()
    return made


@pytest.fixture(scope="module")
def team(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Team, list[dict[str, Any]]]]:
    place = tmp_path_factory.mktemp("services")
    (place / "mlflow").mkdir()
    with ExitStack() as stack:
        mlflow = stack.enter_context(running_mlflow(place / "mlflow", free_port()))
        port, messages = stack.enter_context(told())
        environment = {
            **os.environ,
            "PREFECT_HOME": str(place / "prefect"),
            "PREFECT_RESULTS_LOCAL_STORAGE_PATH": str(place / "prefect" / "storage"),
            "PREFECT_API_URL": f"http://127.0.0.1:{free_port()}/api",
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
            "MLFLOW_TRACKING_URI": mlflow,
            "BMM_NOTIFY": f"json://127.0.0.1:{port}",
            "XDG_CACHE_HOME": str(place / "cache"),
            "OMP_NUM_THREADS": "1",
        }
        services = Team(place, zoo.recipe, environment)
        stack.callback(services.stop)
        services.start_server()
        services.bmm("deploy", zoo.recipe)
        services.start_worker()
        yield services, messages


def test_four_nights(zoo: Zoo, team: tuple[Team, list[dict[str, Any]]]) -> None:
    services, messages = team
    share = ("expert", "task-vectors")

    first = services.end(services.begin())
    assert first["state_name"] == "Promoted", first["state"]
    assert services.aliases() == {"champion": "1"}
    assert sorted(one["name"] for one in champion_of(zoo.recipe)["experts"]) == sorted(zoo.names[:-1])
    pages = services.pages(first["id"])
    assert pages.keys() >= {"bmm-night-inputs", "bmm-night", "bmm-figures", "bmm-test-scores"}
    assert services.environment["MLFLOW_TRACKING_URI"] in pages["bmm-night"]

    second = services.end(services.begin())
    assert second["state_name"] == "Unchanged", second["state"]
    assert second["total_run_time"] < 60
    assert services.aliases() == {"champion": "1"}

    before = {kind: services.keys(kind) for kind in share}
    zoo.better()
    copy_expert(zoo.folder, zoo.names[1], "broken")
    spoil(zoo.folder / "experts" / "broken")
    third = services.end(services.begin())
    assert third["state_name"] == "Promoted", third["state"]
    assert services.aliases() == {"champion": "2", "previous": "1"}
    assert {kind: len(services.keys(kind) - before[kind]) for kind in share} == {"expert": 2, "task-vectors": 1}
    assert "broken" in messages[-1]["message"]
    assert "broken" not in [one["name"] for one in champion_of(zoo.recipe)["experts"]]

    before = {kind: services.keys(kind) for kind in (*share, "walk", "anchor")}
    zoo.add()
    run = services.begin()
    wait_for(lambda: services.keys("task-vectors") - before["task-vectors"], "the new expert's task vector")
    services.kill("worker")
    assert services.state(run)["state_type"] == "RUNNING"
    services.kill("server")
    services.start_server()
    services.mark_the_dead()
    assert services.state(run)["state_name"] == "Crashed"
    assert services.aliases() == {"champion": "2", "previous": "1"}
    services.start_worker()
    services.retry(run)
    wait_for(lambda: services.keys("anchor") - before["anchor"], "the new anchor")
    services.kill("worker")
    services.mark_the_dead()
    services.start_worker()
    services.retry(run)
    fourth = services.end(run)
    assert fourth["state_name"] == "Promoted", fourth["state"]
    assert services.aliases() == {"champion": "3", "previous": "2"}
    assert sorted(one["name"] for one in champion_of(zoo.recipe)["experts"]) == sorted(zoo.names)
    assert {kind: len(services.keys(kind) - before[kind]) for kind in share} == {"expert": 1, "task-vectors": 1}
    assert Store.open(services.store).verify() == []

    heads = [message["title"] for message in messages]
    assert heads == [
        "team: version 1 is the new champion",
        "team: nothing has changed; version 1 stays the champion",
        "team: version 2 is the new champion, before it version 1",
        "team: version 3 is the new champion, before it version 2",
    ]
    assert "| mean |" in messages[-1]["message"]
    assert services.find("flow_runs", flow_runs={"state": {"type": {"any_": ["RUNNING"]}}}) == []
