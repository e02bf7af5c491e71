"""The MLflow record of a merge: on a sqlite file, on a real server, and when nobody answers."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow_server import free_port, running_mlflow

from bmm.pipeline import Merge
from bmm.store import Store
from tasks.addresses import without_credentials
from tasks.tracking import TrackingError, track, track_or_explain, tracking_uri

Finished = tuple[Path, Path, Merge]


@pytest.fixture(scope="module")
def merged(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Merge]:
    """A finished merge whose store holds a sqlite record of its own."""
    place = tmp_path_factory.mktemp("tracking")
    shutil.copytree(finished[1], place / "store")
    shutil.copytree(finished[2].output, place / "merged")
    return Store.open(place / "store"), replace(finished[2], output=place / "merged")


@pytest.fixture(scope="module")
def client(merged: tuple[Store, Merge]) -> Any:
    track(*merged)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri(merged[0]))


def runs(client: Any, merge: Merge) -> tuple[list[Any], dict[str, list[Any]]]:
    """Return the parents, and their children by parent, of all runs that are not deleted."""
    name = merge.document["recipe"]["tracking"]["experiment"]
    found = client.search_runs([client.get_experiment_by_name(name).experiment_id])
    parents = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    children: dict[str, list[Any]] = {}
    for run in found:
        if "mlflow.parentRunId" in run.data.tags:
            children.setdefault(run.data.tags["mlflow.parentRunId"], []).append(run)
    return parents, children


def artifacts(client: Any, run_id: str, folder: str = "") -> set[str]:
    return {entry.path for entry in client.list_artifacts(run_id, folder)}


def test_one_parent_with_the_documents_numbers(client: Any, merged: tuple[Store, Merge]) -> None:
    document = merged[1].document
    ((parent,), _) = runs(client, merged[1])
    assert parent.info.status == "FINISHED"
    for split in ("validation", "test"):
        for task, entry in document["metrics"][split].items():
            for role in ("base", "expert", "anchor", "merged"):
                assert parent.data.metrics[f"{split}.{task}.{role}"] == entry[role]
        share = document["metrics"][split]["mean"]["share_of_experts"]
        assert parent.data.metrics[f"{split}.share_of_experts.merged"] == share["merged"]
    recipe = document["recipe"]
    assert parent.data.params["anchor.method"] == recipe["anchor"]["method"]
    assert parent.data.params["search.trials"] == str(recipe["search"]["trials"])
    assert parent.data.params["base_model"] == recipe["base_model"]


def test_lineage_stands_in_the_tags(client: Any, merged: tuple[Store, Merge]) -> None:
    document = merged[1].document
    ((parent,), _) = runs(client, merged[1])
    tags = parent.data.tags
    assert tags["bmm.base"] == document["base"]["digest"]
    assert {name: tags[f"bmm.expert.{name}"] for name in ("task0", "task1", "task2")} == {
        expert["name"]: expert["digest"] for expert in document["experts"]
    }
    assert tags["bmm.recipe_digest"] == document["recipe_digest"]
    # What stands on the run's page as its description.
    assert tags["mlflow.note.content"].startswith("Three experts became one model")
    assert tags["bmm.model_digest"] == merged[1].results["publish"].reference("model").digest


def test_one_child_for_each_trial(client: Any, merged: tuple[Store, Merge]) -> None:
    trials = merged[1].document["search"]["trials"]
    ((parent,), children) = runs(client, merged[1])
    by_name = {run.info.run_name: run for run in children[parent.info.run_id]}
    assert len(children[parent.info.run_id]) == len(trials) == 5
    for trial in trials:
        child = by_name[f"trial {trial['index']}"]
        assert child.data.metrics["objective"] == trial["objective"]
        for task, value in trial["tasks"].items():
            assert child.data.metrics[f"validation.{task}"] == value
        for group, setting in trial["settings"].items():
            expected = "inf" if setting["lambda"] is None else str(setting["lambda"])
            assert child.data.params[f"lambda.{group}"] == expected
            assert child.data.params[f"gamma.{group}"] == str(setting["gamma"])
        assert child.data.tags["bmm.origin"] == trial["origin"]


def test_artifacts(client: Any, merged: tuple[Store, Merge], tmp_path: Path) -> None:
    ((parent,), _) = runs(client, merged[1])
    run_id = parent.info.run_id
    assert artifacts(client, run_id) >= {"recipe.yaml", "merge.json", "report.html", "figures", "model", "lineage.json"}
    figures = artifacts(client, run_id, "figures")
    assert figures
    assert all(name.endswith(".png") for name in figures)
    # Everything that the output folder had, and nothing of how the store keeps it.
    output = {f"model/{path.name}" for path in merged[1].output.iterdir()}
    assert artifacts(client, run_id, "model") == output
    assert artifacts(client, run_id, "model/heads") == {f"model/heads/task{index}.safetensors" for index in range(3)}
    recipe = Path(client.download_artifacts(run_id, "recipe.yaml", str(tmp_path)))
    assert yaml.safe_load(recipe.read_text(encoding="utf-8")) == merged[1].document["recipe"]


def test_a_merge_is_logged_once(client: Any, merged: tuple[Store, Merge]) -> None:
    (before, children) = runs(client, merged[1])
    assert track(*merged).run_id == before[0].info.run_id
    (after, again) = runs(client, merged[1])
    assert [run.info.run_id for run in after] == [run.info.run_id for run in before]
    assert {key: len(value) for key, value in again.items()} == {key: len(value) for key, value in children.items()}


def test_a_record_that_a_kill_cut_short_is_replaced(client: Any, merged: tuple[Store, Merge]) -> None:
    ((left,), _) = runs(client, merged[1])
    client.update_run(left.info.run_id, status="RUNNING")
    tracked = track(*merged)
    ((parent,), children) = runs(client, merged[1])
    assert tracked.run_id == parent.info.run_id != left.info.run_id
    assert parent.info.status == "FINISHED"
    # The trials of the dead record are gone with it.
    assert {key: len(value) for key, value in children.items()} == {parent.info.run_id: 5}


def test_more_settings_than_one_request_holds_are_all_logged(merged: tuple[Store, Merge], tmp_path: Path) -> None:
    store, merge = merged
    settings = {f"layer-{index}": {"lambda": 0.1, "gamma": 1.0} for index in range(130)}
    document = json.loads(json.dumps(merge.document))
    document["recipe"]["tracking"]["experiment"] = "many"
    document["search"]["trials"] = [{**document["search"]["trials"][0], "settings": settings}]
    many = replace(merge, document=document)
    track(store, many)
    from mlflow import MlflowClient

    (_, children) = runs(MlflowClient(tracking_uri(store)), many)
    ((child,),) = children.values()
    assert len(child.data.params) == 260


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://user:secret@host:5000/path", "http://host:5000/path"),
        ("https://user:se@cret@host", "https://host"),
        ("sqlite:////folder/mlflow.db", "sqlite:////folder/mlflow.db"),
        ("failed at http://user:secret@host/a?b=c@d, sorry", "failed at http://host/a?b=c@d, sorry"),
    ],
)
def test_credentials_are_not_shown(uri: str, shown: str) -> None:
    assert without_credentials(uri) == shown


def test_nobody_answers(merged: tuple[Store, Merge], monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:secret@127.0.0.1:{port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackingError) as raised:
        track(*merged)
    assert str(port) in str(raised.value)
    assert "secret" not in str(raised.value)
    assert raised.value.__suppress_context__
    outcome = track_or_explain(*merged, enabled=True)
    assert outcome.tracked is None
    assert outcome.tracking_error
    assert "secret" not in outcome.tracking_error


def test_tracking_can_be_switched_off(merged: tuple[Store, Merge]) -> None:
    def refuse(_: Store, __: Merge) -> Any:
        raise AssertionError("tracked all the same")

    outcome = track_or_explain(*merged, enabled=False, log=refuse)
    assert (outcome.tracked, outcome.tracking_error) == (None, None)


@pytest.mark.slow
def test_a_real_server(
    merged: tuple[Store, Merge],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with running_mlflow(tmp_path, free_port()) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address.replace("http://", "http://user:secret@"))
        tracked = track(*merged)
        assert tracked.uri == address
        said = capfd.readouterr()
        assert said.out == ""
        assert "secret" not in said.err
        from mlflow import MlflowClient

        client = MlflowClient(address)
        ((parent,), children) = runs(client, merged[1])
        assert parent.info.run_id == tracked.run_id
        assert len(children[parent.info.run_id]) == 5
        assert {"recipe.yaml", "merge.json", "report.html", "figures", "model"} <= artifacts(client, tracked.run_id)
        assert track(*merged) == tracked
        assert len(runs(client, merged[1])[0]) == 1


def test_what_trials_measure_without_labels_is_named_so(client: Any, merged: tuple[Store, Merge]) -> None:
    store, merge = merged
    document = json.loads(json.dumps(merge.document))
    document["search"]["split"] = "unlabelled"
    document["recipe"]["tracking"]["experiment"] = "without-labels"
    other = replace(merge, document=document)
    track(store, other)
    ((parent,), children) = runs(client, other)
    for child in children[parent.info.run_id]:
        assert "unlabelled.task0" in child.data.metrics
        assert not [name for name in child.data.metrics if name.startswith("validation.")]
