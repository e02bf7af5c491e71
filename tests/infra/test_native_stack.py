"""The services of the compose file, started for real on this machine, and a merge that goes through all of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "infra" / "native"))
from postgres import find_programs  # noqa: E402 - a script's neighbours
from stack import Stack  # noqa: E402

pytestmark = pytest.mark.slow

RUN_IN_WORKER = """
import json, sys
from prefect.deployments import run_deployment
from flows.merge import merge_flow

if __name__ == "__main__":
    root, parameters = sys.argv[1:]
    stored = merge_flow.from_source(source=root, entrypoint="flows/merge.py:merge_flow")
    stored.deploy(name="stack", work_pool_name="bmm", build=False, push=False, print_next_steps=False)
    run = run_deployment("merge/stack", parameters=json.loads(parameters), timeout=300)
    print("ended as", run.state.type.value, run.state.message)
"""


@pytest.fixture(scope="module")
def stack(pico_source: Path) -> Iterator[Stack]:
    """Everything that the compose file names, one process each, well by its health checks."""
    try:
        find_programs()
    except SystemExit as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    # Not in pytest's own folder, which the user postgres cannot reach.
    folder = Path(tempfile.mkdtemp(prefix="bmm-stack-"))
    folder.chmod(0o755)
    made = Stack(folder, free_ports=True, BMM_EXPERTS=str(pico_source))
    try:
        made.up(replicas=1)
        yield made
    finally:
        made.down()
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def merged(stack: Stack, pico_source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The document of a merge that a flow run of a deployment made in the stack's worker."""
    folder = tmp_path_factory.mktemp("through-the-stack") / "pico"
    shutil.copytree(pico_source, folder)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    recipe |= {"cluster": {"scheduler": stack.compose.address("tls://dask-scheduler:8786")}, "search": "none"}
    recipe |= {"anchor": {"method": "average"}, "evaluation": {"compare": [], "bootstrap_samples": 100}}
    parameters = {"recipe": recipe, "folder": str(folder), "store": "s3://bmm/store"}
    command = [sys.executable, "-c", RUN_IN_WORKER, str(ROOT), json.dumps(parameters)]
    done = subprocess.run(
        command, env=stack.environment(), cwd=ROOT, capture_output=True, text=True, timeout=400, check=False
    )
    assert "ended as COMPLETED" in done.stdout, done.stdout + done.stderr + stack.log("worker")
    document: dict[str, Any] = json.loads((folder / "merged" / "merge.json").read_text(encoding="utf-8"))
    return document


def rows(stack: Stack, database: str, query: str) -> list[str]:
    """What PostgreSQL answers, a line for each row."""
    said = stack.compose.service("postgres")
    port = said.command[said.command.index("-p") + 1]
    environment = {**stack.environment("postgres"), "PGPASSWORD": said.environment["POSTGRES_PASSWORD"]}
    words = ["psql", "-h", "127.0.0.1", "-p", port, "-U", "postgres", "-d", database, "-X", "-A", "-t", "-c", query]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=180, check=True)
    return done.stdout.split("\n")[:-1]


def login(stack: Stack, name: str) -> httpx.BasicAuth:
    said = stack.environment()
    if name == "prefect":
        return httpx.BasicAuth(*said["PREFECT_API_AUTH_STRING"].split(":"))
    return httpx.BasicAuth(said["MLFLOW_TRACKING_USERNAME"], said["MLFLOW_TRACKING_PASSWORD"])


def test_one_command_starts_services_says_where_they_are_and_ends_them() -> None:
    folder = Path(tempfile.mkdtemp(prefix="bmm-stack-"))
    command = [sys.executable, str(ROOT / "infra" / "native" / "stack.py"), str(folder), "--free-ports"]
    # What needs PostgreSQL is started below.
    process = subprocess.Popen([*command, "--only", "buckets"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        assert said == f"all is well; in another shell: . {folder}/environment.sh\n"
        assert process.stdout.readline().startswith("  prefect:4200 is 127.0.0.1:")
        started = psutil.Process(process.pid).children(recursive=True)
        assert any("moto.server" in child.cmdline() for child in started)
        process.terminate()
        assert process.wait(180) == 0
        assert not psutil.wait_procs(started, timeout=60)[1]
    finally:
        process.kill()
        shutil.rmtree(folder)


def test_every_service_is_well_by_its_own_health_check(stack: Stack) -> None:
    lasting = [name for name in stack.compose.names() if stack.compose.service(name).healthcheck]
    assert {*lasting, "buckets"} == set(stack.compose.names())
    assert {name: stack.well(name) for name in lasting} == dict.fromkeys(lasting, True)


def test_nothing_listens_beyond_this_machine(stack: Stack) -> None:
    listening = {}
    for name, pids in stack.pids().items():
        for process in [psutil.Process(pids[0]), *psutil.Process(pids[0]).children(recursive=True)]:
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    listening.setdefault(name, set()).add(connection.laddr.ip)
    assert set(listening) == set(stack.pids())
    assert set().union(*listening.values()) == {"127.0.0.1"}


def test_nobody_gets_in_without_a_login(stack: Stack) -> None:
    prefect, mlflow = (stack.compose.address(one) for one in ("http://prefect:4200/api", "http://mlflow:5000/api"))
    asked = {
        "prefect": ("POST", f"{prefect}/flow_runs/filter", {}),
        "mlflow": ("POST", f"{mlflow}/2.0/mlflow/experiments/search", {"max_results": 5}),
    }
    for name, (method, address, body) in asked.items():
        assert httpx.request(method, address, json=body, timeout=60).status_code == 401
        wrong = httpx.BasicAuth("bmm", "wrong")
        assert httpx.request(method, address, json=body, auth=wrong, timeout=60).status_code == 401
        assert httpx.request(method, address, json=body, auth=login(stack, name), timeout=60).status_code == 200
    # Passwords of databases are asked for on every way in, and kept as SCRAM.
    methods = rows(stack, "postgres", "SELECT DISTINCT type, address, auth_method FROM pg_hba_file_rules")
    assert {line.split("|")[-1] for line in methods} == {"scram-sha-256"}
    assert {line.split("|")[1] for line in methods} <= {"", "127.0.0.1", "::1"}
    kept = rows(stack, "postgres", "SELECT left(rolpassword, 13) FROM pg_authid WHERE rolcanlogin")
    assert kept == ["SCRAM-SHA-256"] * 3
    assert rows(stack, "postgres", "SELECT has_database_privilege('mlflow', 'prefect', 'CONNECT')") == ["f"]


def test_prefects_pages_know_the_api_and_ask_for_the_login(stack: Stack) -> None:
    address = stack.compose.address("http://prefect:4200")
    page = httpx.get(address, follow_redirects=True, timeout=60)
    assert (page.status_code, "<html" in page.text.lower()) == (200, True)
    said = httpx.get(f"{address}/ui-settings", timeout=60).json()
    assert (said["api_url"], said["auth"]) == (f"{address}/api", "BASIC")
    # Written where the server may write, not into the package.
    assert (stack.folder / "volumes" / "prefect" / "prefect-pages").is_dir()


@pytest.mark.parametrize("scheme", ["tcp", "tls"])
def test_dask_listens_to_nobody_without_our_certificate(stack: Stack, scheme: str) -> None:
    from distributed import Client

    address = stack.compose.address("tls://dask-scheduler:8786").replace("tls://", f"{scheme}://")
    with pytest.raises((OSError, ValueError, TypeError, RuntimeError)):
        Client(address, timeout=3, set_as_default=False)


def test_a_merge_goes_through_every_service(
    stack: Stack, merged: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Grams alone are not made: nothing in this merge reads them.
    assert {name for name, stage in merged["stages"].items() if stage["state"] == "cached"} <= {"grams"}
    # Prefect's run, kept in PostgreSQL.
    names = rows(
        stack, "prefect", "SELECT f.name || ' ' || r.state_type FROM flow_run r JOIN flow f ON f.id = r.flow_id"
    )
    assert names == ["merge COMPLETED"]
    # Task runs come as events, a moment after the flow run's end.
    done: set[str] = set()
    deadline = time.monotonic() + 180
    while not done >= {"experts", "search", "publish", "track"}:
        assert time.monotonic() < deadline, done
        names = rows(stack, "prefect", "SELECT name FROM task_run WHERE state_type = 'COMPLETED'")
        done = {name.partition("-")[0] for name in names}
    # MLflow's record, its numbers in PostgreSQL and its files in the bucket.
    said = stack.environment()
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, said[name])
    assert rows(stack, "mlflow", "SELECT count(*) FROM runs WHERE status = 'FINISHED'") == ["1"]
    from mlflow import MlflowClient

    client = MlflowClient()
    (experiment,) = client.search_experiments(filter_string="name != 'Default'")
    (run,) = client.search_runs([experiment.experiment_id], "tags.`bmm.model_digest` LIKE '%'")
    share = merged["metrics"]["test"]["mean"]["share_of_experts"]["merged"]
    assert run.data.metrics["test.share_of_experts.merged"] == share
    assert "model/model.safetensors" in {one.path for one in client.list_artifacts(run.info.run_id, "model")}
    import boto3

    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.setenv(name, said[name])
    objects = boto3.client("s3", region_name=said["AWS_REGION"])
    for bucket, piece in (("mlflow", "model.safetensors"), ("bmm", "artefacts/walk/")):
        found = [one["Key"] for one in objects.list_objects_v2(Bucket=bucket)["Contents"]]
        assert [key for key in found if piece in key], found


def test_secrets_stay_where_they_belong(stack: Stack, merged: dict[str, Any]) -> None:
    passwords = [
        line.split("=", 1)[1].rpartition(":")[2]
        for line in (stack.folder / "secrets" / "environment").read_text(encoding="utf-8").splitlines()
        if not line.startswith("BMM_UID")
    ]
    assert len(passwords) == 8
    texts = {
        path.name: path.read_text(encoding="utf-8", errors="replace") for path in (stack.folder / "logs").iterdir()
    }
    texts["merge.json"] = json.dumps(merged)
    for name, pids in stack.pids().items():
        for process in [psutil.Process(pids[0]), *psutil.Process(pids[0]).children(recursive=True)]:
            texts[f"command line of {name}"] = " ".join(process.cmdline())
    assert [name for name, text in texts.items() if any(password in text for password in passwords)] == []
    for path in (stack.folder / "secrets" / "environment", stack.folder / "secrets" / "tls" / "key.pem"):
        assert path.stat().st_mode & 0o077 == 0
    # Made once: who starts again finds the same.
    before = (stack.folder / "secrets" / "environment").read_bytes()
    subprocess.run(
        [sys.executable, str(ROOT / "infra" / "services" / "make_secrets.py"), str(stack.folder / "secrets")],
        check=True,
    )
    assert (stack.folder / "secrets" / "environment").read_bytes() == before


def test_whoever_merges_by_hand_gets_the_same_variables(stack: Stack) -> None:
    path = stack.write_environment()
    assert path.stat().st_mode & 0o077 == 0
    said = subprocess.run(
        ["bash", "-c", f". {path}; env"], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=True
    )
    found = dict(line.split("=", 1) for line in said.stdout.splitlines() if "=" in line)
    expected = stack.environment()
    names = ("BMM_STORE", "PREFECT_API_URL", "PREFECT_API_AUTH_STRING", "MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL")
    assert {name: found[name] for name in names} == {name: expected[name] for name in names}
