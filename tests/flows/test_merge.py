"""The merge flow on a real Prefect server, and on the temporary one that it starts where none is configured."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from bmm.pipeline import STAGES

Command = Callable[..., Any]
Files = Callable[[Path], dict[str, bytes]]
Finished = tuple[Path, Path, Any]

LOADED = "import json\nheavy = [name for name in ('torch', 'transformers', 'distributed') if name in sys.modules]\n"
LOADED += "print('LOADED', json.dumps(heavy), file=sys.stderr)"
EVERY_STAGE_CACHED = dict.fromkeys(STAGES, "cached")


def states(document: dict[str, Any]) -> dict[str, str]:
    return {stage: entry["state"] for stage, entry in document["stages"].items()}


def loaded(said: Any) -> list[str]:
    (line,) = [line for line in said.err.splitlines() if line.startswith("LOADED ")]
    found: list[str] = json.loads(line.removeprefix("LOADED "))
    return found


def read_document(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "merged" / "merge.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def served_place(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder without an output and the place of a store, shared by the tests of this module."""
    place = tmp_path_factory.mktemp("served")
    shutil.copytree(finished[0], place / "pico", ignore=shutil.ignore_patterns("merged"))
    return place / "pico", place / "store"


@pytest.fixture
def served(served_place: tuple[Path, Path], on_server: Any, bmm_here: Command) -> tuple[Path, Path]:
    """The same place after a merge through the server."""
    folder, store = served_place
    if not (folder / "merged").exists():
        said = bmm_here("merge", folder / "recipe.yaml", "--store", store, "--json")
        assert said.code == 0, said.out + said.err
        assert set(states(said.document).values()) == {"ran"}
        runs = on_server.task_runs(on_server.last_flow_run())
        (folder / "first_run.json").write_text(json.dumps(runs), encoding="utf-8")
    return folder, store


def test_the_server_and_no_server_give_the_same_bytes(
    served: tuple[Path, Path], finished: Finished, model_files: Files
) -> None:
    ours, plain = model_files(served[0] / "merged"), model_files(finished[2].output)
    assert ours.keys() == plain.keys()
    assert {"config.json", "heads/task0.safetensors"} <= ours.keys()
    assert ours == plain


def test_the_server_knows_seven_stages(served: tuple[Path, Path], on_server: Any) -> None:
    runs = json.loads((served[0] / "first_run.json").read_text(encoding="utf-8"))
    assert [run["name"] for run in runs] == [*STAGES, *(run["name"] for run in runs[len(STAGES) :])]
    assert {run["state_name"] for run in runs} == {"Completed"}
    assert [run["name"].split("-")[0] for run in runs[len(STAGES) :]] == ["track"]
    (flow_run,) = on_server.find("flow_runs", flow_runs={"id": {"any_": [runs[0]["flow_run_id"]]}})
    assert flow_run["state_name"] == "Completed"


def test_the_tables_are_on_the_server(served: tuple[Path, Path], on_server: Any) -> None:
    document = read_document(served[0])
    runs = json.loads((served[0] / "first_run.json").read_text(encoding="utf-8"))
    found = on_server.find("artifacts", flow_runs={"id": {"any_": [runs[0]["flow_run_id"]]}})
    by_key = {artifact["key"]: artifact for artifact in found}
    accuracy = json.loads(by_key["bmm-test-scores"]["data"])
    for row in accuracy:
        entry = document["metrics"]["test"][row["task"]]
        assert {name: row[name] for name in ("base", "expert", "anchor", "merged")} == {
            name: entry[name] for name in ("base", "expert", "anchor", "merged")
        }
    # Recipe order is not kept by the artefact, but the mean over the tasks stands below them.
    assert [row["task"] for row in accuracy] == ["task0", "task1", "task2", "mean"]
    methods = json.loads(by_key["bmm-methods"]["data"])
    assert [row["method"] for row in methods] == [row["method"] for row in document["methods"]]
    share = document["metrics"]["test"]["mean"]["share_of_experts"]["merged"]
    assert f"{share:.1%}" in by_key["bmm-merge"]["data"]


def test_a_second_run_in_another_process_finds_every_stage_cached(
    served: tuple[Path, Path], on_server: Any, bmm_process: Command, model_files: Files
) -> None:
    folder, store = served
    before = model_files(folder / "merged")
    said = bmm_process("merge", folder / "recipe.yaml", "--store", store, "--json", before="import sys", after=LOADED)
    assert said.code == 0, said.err
    assert states(said.document) == EVERY_STAGE_CACHED
    assert states(read_document(folder)) == EVERY_STAGE_CACHED
    runs = on_server.task_runs(on_server.last_flow_run())
    assert [(run["name"], run["state_name"]) for run in runs][:7] == [(stage, "Cached") for stage in STAGES]
    # The keys of Prefect's cache come out the same in a new process, and nothing that could build a model is loaded.
    assert loaded(said) == []
    assert model_files(folder / "merged") == before


def test_a_second_run_without_a_server_loads_no_torch(done: tuple[Path, Path], bmm_process: Command) -> None:
    folder, store = done
    words = ("merge", folder / "recipe.yaml", "--store", store, "--no-server")
    said = bmm_process(*words, "--json", before="import sys", after=LOADED)
    assert said.code == 0, said.err
    assert states(said.document) == EVERY_STAGE_CACHED
    assert loaded(said) == []


def test_a_deleted_artefact_is_made_again_though_prefect_calls_it_cached(
    served: tuple[Path, Path], on_server: Any, bmm_here: Command, model_files: Files
) -> None:
    folder, store = served
    before = model_files(folder / "merged")
    shutil.rmtree(sorted((store / "artefacts" / "grams").iterdir())[0])
    said = bmm_here("merge", folder / "recipe.yaml", "--store", store, "--json")
    assert states(said.document) == {**EVERY_STAGE_CACHED, "grams": "ran"}
    runs = on_server.task_runs(on_server.last_flow_run())
    assert [run["state_name"] for run in runs if run["name"] == "grams"] == ["Cached", "Completed"]
    assert {run["state_name"] for run in runs if run["name"] in {*STAGES} - {"grams"}} == {"Cached"}
    assert model_files(folder / "merged") == before


def test_a_lost_result_of_prefect_costs_nothing(served: tuple[Path, Path], on_server: Any, bmm_here: Command) -> None:
    folder, store = served
    results = Path(os.environ["PREFECT_RESULTS_LOCAL_STORAGE_PATH"])
    ours = [path for path in results.rglob("bmm-anchor-*") if path.is_file()]
    assert ours
    for path in ours:
        path.write_text("{", encoding="utf-8")
    said = bmm_here("merge", folder / "recipe.yaml", "--store", store, "--json")
    assert said.code == 0, said.out + said.err
    assert states(said.document) == EVERY_STAGE_CACHED


def test_fresh_runs_everything_again_to_the_same_bytes(
    served: tuple[Path, Path], on_server: Any, bmm_here: Command, model_files: Files
) -> None:
    folder, store = served
    before = model_files(folder / "merged")
    made = {path: path.stat().st_ino for path in sorted((store / "artefacts").glob("*/*/manifest.json"))}
    said = bmm_here("merge", folder / "recipe.yaml", "--store", store, "--json", "--fresh")
    assert states(said.document) == dict.fromkeys(STAGES, "ran")
    assert {run["state_name"] for run in on_server.task_runs(on_server.last_flow_run())} == {"Completed"}
    assert model_files(folder / "merged") == before
    again = {path: path.stat().st_ino for path in sorted((store / "artefacts").glob("*/*/manifest.json"))}
    assert again.keys() == made.keys()
    assert [str(path) for path in made if made[path] == again[path]] == []


def test_the_users_mistake_inside_a_task_is_told_once(
    done: tuple[Path, Path],
    on_server: Any,
    bmm_here: Command,
    edit_recipe: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    folder, _ = done
    monkeypatch.setattr("bmm.cluster.connection._CONNECT_SECONDS", 1)
    recipe = edit_recipe(folder, cluster={"scheduler": "tcp://127.0.0.1:9"}, output="./other")
    said = bmm_here("merge", recipe, "--store", tmp_path / "other-store")
    assert said.code == 2
    (line,) = said.complaints
    assert line.startswith("bmm: 'cluster.scheduler': no Dask scheduler answers at tcp://127.0.0.1:9")
    assert said.out == ""
    flow_run = on_server.last_flow_run()
    assert flow_run["state_name"] == "Failed"
    runs = on_server.task_runs(flow_run)
    assert [(run["name"], run["state_name"]) for run in runs] == [
        ("experts", "Completed"),
        ("task-vectors", "Completed"),
        ("grams", "Failed"),
    ]
    # The Grams' task retries faults of the machine, never a mistake.
    assert runs[-1]["run_count"] == 1
    assert not (folder / "other").exists()


def test_not_a_number_in_an_expert_stops_the_flow(done: tuple[Path, Path], on_server: Any, bmm_here: Command) -> None:
    folder, store = done
    weights = folder / "experts" / "task1" / "model.safetensors"
    tensors = load_file(weights)
    tensors["bert.encoder.layer.1.output.dense.weight"][0, 0] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    said = bmm_here("merge", folder / "recipe.yaml", "--store", store, "--json")
    assert said.code == 2
    assert said.document["exit_code"] == 2
    assert "bert.encoder.layer.1.output.dense.weight" in said.document["error"]
    assert on_server.last_flow_run()["state_name"] == "Failed"


def test_a_server_that_does_not_answer_is_one_sentence(done: tuple[Path, Path], bmm_process: Command) -> None:
    folder, store = done
    address = "http://127.0.0.1:9/api"
    said = bmm_process("merge", folder / "recipe.yaml", "--store", store, PREFECT_API_URL=address)
    assert said.code == 1
    (line,) = said.complaints
    assert "PREFECT_API_URL" in line
    assert "--no-server" in line


def home_of(folder: Path) -> dict[str, str]:
    """The environment of a Prefect that keeps everything in one folder."""
    return {"PREFECT_HOME": str(folder), "PREFECT_RESULTS_LOCAL_STORAGE_PATH": str(folder / "storage")}


@pytest.mark.slow
def test_with_no_server_configured_the_flow_starts_its_own(
    finished: Finished,
    bmm_process: Command,
    edit_recipe: Callable[..., Path],
    model_files: Files,
    tmp_path: Path,
) -> None:
    """And with local workers: the bytes equal those of the running scheduler's workers."""
    folder, store = tmp_path / "pico", tmp_path / "store"
    shutil.copytree(finished[0], folder, ignore=shutil.ignore_patterns("merged"))
    words = ("merge", edit_recipe(folder, cluster={"workers": 1}), "--store", store, "--json")
    first = bmm_process(*words, **home_of(tmp_path / "prefect-1"))
    assert first.code == 0, first.out + first.err
    assert set(states(first.document).values()) == {"ran"}
    assert model_files(folder / "merged") == model_files(finished[2].output)
    assert (tmp_path / "prefect-1").is_dir()
    # Prefect's database and results are lost: what is finished is known by the store.
    second = bmm_process(*words, **home_of(tmp_path / "prefect-2"))
    assert second.code == 0, second.out + second.err
    assert states(second.document) == EVERY_STAGE_CACHED
    assert model_files(folder / "merged") == model_files(finished[2].output)


@pytest.mark.slow
def test_two_merges_at_once_compute_each_artefact_once(
    finished: Finished, edit_recipe: Callable[..., Path], recording: str, model_files: Files, tmp_path: Path
) -> None:
    folder, store = tmp_path / "pico", tmp_path / "store"
    shutil.copytree(finished[0], folder, ignore=shutil.ignore_patterns("merged"))
    started = []
    for name in ("one", "two"):
        recipe = edit_recipe(folder, output=f"./{name}").rename(folder / f"{name}.yaml")
        shutil.copyfile(recipe, folder / "recipe.yaml")
        command = [sys.executable, "-c", recording + "\nfrom flows.cli import main\nmain()", "merge", str(recipe)]
        command += ["--store", str(store), "--no-server", "--json"]
        started.append(
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        )
    for process in started:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, out + err
    lines = (store / "made.log").read_text(encoding="utf-8").splitlines()
    # A stage's record holds references alone, and each run that did a part of the stage's work writes it.
    made = Counter(line for line in lines if not line.startswith("stage-"))
    kinds = {line.split()[0] for line in made}
    assert {"expert", "gram-shard", "grams", "anchor", "search", "evaluation", "model", "predictions"} <= kinds
    assert {line: count for line, count in made.items() if count > 1} == {}
    for name in ("one", "two"):
        assert model_files(folder / name) == model_files(finished[2].output)
    assert not list((store / "artefacts").glob("gram-shard/*"))
