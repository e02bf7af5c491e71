"""Nights on a real Prefect server: states, pages, retries that carry on, and runs whose process was killed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from answers import Answer
from nights import edit, found_experts, nudge

from bmm.store import Store
from tasks.champions import Champions

Command = Callable[..., Answer]
pytestmark = pytest.mark.slow


@pytest.fixture
def recipe(pico: Path, in_process: None) -> Path:
    path = found_experts(pico, gate={"gain": -1, "loss": 1, "certainty": 0})
    edit(path, regression={"mode": "module-wise"}, anchor={"method": "average"}, search={"trials": 2})
    return path


def artifacts(server: Any, run: dict[str, Any]) -> dict[str, str]:
    found = server.find("artifacts", flow_runs={"id": {"any_": [run["id"]]}})
    return {artifact["key"]: artifact["data"] for artifact in found}


def retry(run: dict[str, Any]) -> None:
    entrypoint = "flows.nightly.nightly_flow"
    words = [sys.executable, "-m", "prefect", "flow-run", "retry", run["id"], "--entrypoint", entrypoint]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr


def killed_run(store: Path, server: Any) -> dict[str, Any]:
    """Return a flow run that the server believes to be running, and whose process is dead."""
    program = f"""
import os, signal
from prefect import flow
from bmm.store import Store
from flows.dead_runs import running

@flow(name="nightly")
def dies() -> None:
    with running(Store.open({str(store)!r})):
        os.kill(os.getpid(), signal.SIGKILL)

dies()
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=120).returncode == -9
    run: dict[str, Any] = server.last_flow_run()
    assert run["state_name"] == "Running"
    return run


def test_nights_on_a_server(recipe: Path, on_server: Any, bmm_here: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    store = recipe.parent / "store"
    said = bmm_here("nightly", recipe, "--store", store, "--json")
    assert said.code == 0, said.out + said.err
    assert said.document["outcome"] == "promoted"
    run = on_server.last_flow_run()
    assert (run["state_type"], run["state_name"]) == ("COMPLETED", "Promoted")
    assert run["state"]["message"] == "pico-merged: version 1 is the new champion"
    pages = artifacts(on_server, run)
    rows = {row["what"]: row for row in json.loads(pages["bmm-night-inputs"])}
    assert list(rows) == ["base", "task0", "task1", "task2"]
    assert rows["task1"]["digest"] == said.document["experts"]["task1"][:12]
    assert "| task1 | 60 |" in pages["bmm-night"]
    assert said.document["mlflow"]["run_id"] in pages["bmm-night"]
    assert "(data:image/png;base64," in pages["bmm-figures"]
    names = {task["name"] for task in on_server.find("task_runs", flow_runs={"id": {"any_": [run["id"]]}})}
    assert names >= {"discover", "vet", "search", "register", "gate", "promote"}
    assert not list((store / "flow-runs").iterdir())

    dead = killed_run(store, on_server)
    said = bmm_here("nightly", recipe, "--store", store, "--json")
    assert (said.document["outcome"], on_server.last_flow_run()["state_name"]) == ("unchanged", "Unchanged")
    (found,) = on_server.find("flow_runs", flow_runs={"id": {"any_": [dead["id"]]}})
    assert found["state_name"] == "Crashed"
    assert "retry" in found["state"]["message"]

    # A night that fails between the gate and the promotion, in the middle of which an expert is replaced.
    nudge(recipe.parent / "experts" / "task1")

    def fail(*_: Any) -> None:
        nudge(recipe.parent / "experts" / "task2")
        raise PermissionError("not tonight")

    monkeypatch.setattr("tasks.step.PAUSES_SECONDS", [0.1])
    monkeypatch.setattr("flows.night.Champions.put", fail)
    said = bmm_here("nightly", recipe, "--store", store)
    assert (said.code, "not tonight" in said.err) == (1, True)
    run = on_server.last_flow_run()
    assert run["state_name"] == "Failed"
    assert "not tonight" in artifacts(on_server, run)["bmm-night"]
    standing = Champions(Store.open(store), "pico-merged").standing()
    assert standing.champion is not None
    assert (standing.champion.number, standing.move is not None) == ("2", True)
    monkeypatch.undo()
    monkeypatch.setenv("PREFECT_API_URL", on_server.url)
    retry(run)
    again = on_server.find("flow_runs", flow_runs={"id": {"any_": [run["id"]]}})[0]
    assert again["state_name"] == "Promoted"
    standing = Champions(Store.open(store), "pico-merged").standing()
    assert standing.champion is not None
    assert standing.previous is not None
    assert (standing.champion.number, standing.previous.number, standing.move) == ("2", "1", None)
    # The retry went on with what the first attempt had found.
    frozen = {row["what"]: row["digest"] for row in json.loads(artifacts(on_server, again)["bmm-night-inputs"])}
    document = json.loads((recipe.parent / "merged" / "merge.json").read_text())
    assert {one["name"]: one["digest"][:12] for one in document["experts"]}.items() <= frozen.items()


def test_an_expert_replaced_in_the_middle_of_a_night_is_named(
    recipe: Path, on_server: Any, bmm_here: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows import night

    vet = night.broken_experts

    def replaced_meanwhile(*arguments: Any) -> Any:
        found = vet(*arguments)
        nudge(recipe.parent / "experts" / "task1", 1.5)
        return found

    monkeypatch.setattr("flows.night.broken_experts", replaced_meanwhile)
    said = bmm_here("nightly", recipe, "--store", recipe.parent / "store")
    assert said.code == 2
    (line,) = said.complaints
    assert "experts/task1 was changed while the merge was running" in line
    assert not (recipe.parent / "merged").exists()
    assert on_server.last_flow_run()["state_name"] == "Failed"
