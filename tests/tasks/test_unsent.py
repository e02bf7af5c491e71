"""Records that wait for a tracker: kept in the store while a real MLflow server is down, sent when it is back."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow_server import free_port, running_mlflow
from typer.testing import CliRunner

from bmm.pipeline import Merge
from bmm.pruning import prune
from bmm.retention import Retention
from bmm.runs import keep_run
from bmm.store import Store
from tasks import unsent
from tasks.tracking import track_or_explain

Finished = tuple[Path, Path, Merge]


@pytest.fixture
def store(finished: Finished, tmp_path: Path) -> Store:
    """The store of a finished merge, whose output folder nobody has any more."""
    shutil.copytree(finished[1], tmp_path / "store")
    return Store.open(tmp_path / "store")


def merges(finished: Finished, store: Store, count: int) -> list[Merge]:
    """Return merges of recipes that differ, as different nights' would."""
    merge = replace(finished[2], output=Path("/nowhere"))
    made = []
    for night in range(count):
        document = {**merge.document, "recipe_digest": f"{night}" * 64}
        made.append(replace(merge, document=document, record=keep_run(store, document, merge.results)))
    return made


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    """A port where nobody answers yet, at which the environment has its tracker."""
    found = free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:secret@127.0.0.1:{found}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    return found


def bmm_track(store: Store, *words: str) -> Any:
    from flows.cli import app

    return CliRunner().invoke(app, ["track", "--store", str(store.root), *words], catch_exceptions=False)


def test_a_record_waits_once_and_protects_what_it_is_written_from(finished: Finished, store: Store, port: int) -> None:
    (merge,) = merges(finished, store, 1)
    for _ in range(2):
        outcome = track_or_explain(store, merge, enabled=True)
        assert (outcome.tracked, outcome.sent_later) == (None, 0)
        assert str(port) in (outcome.tracking_error or "")
    (one,) = unsent.waiting(store)
    assert (one.run, one.uri) == (merge.record, f"http://127.0.0.1:{port}")
    assert b"secret" not in b"".join(
        path.read_bytes() for path in (store.root / "artefacts" / "unsent").rglob("*.json")
    )
    assert merge.record is not None
    kept = prune(store, Retention(older_than_days=0), set()).protected
    assert {("run", merge.record.key), ("unsent", one.key)} <= kept
    assert "model" in {kind for kind, _ in kept}
    said = bmm_track(store)
    assert said.exit_code == 1
    assert "secret" not in said.output
    assert len(unsent.waiting(store)) == 1


def test_a_record_whose_merge_is_gone_is_let_go(finished: Finished, store: Store) -> None:
    (merge,) = merges(finished, store, 1)
    assert merge.record is not None
    unsent.put(store, merge.record, "http://somewhere")
    assert store.discard("run", merge.record.key)
    assert unsent.send(store, None, lambda *_: pytest.fail("sent")) == 0
    assert unsent.waiting(store) == []


@pytest.mark.slow
def test_what_waited_is_sent_once_when_the_tracker_is_back(
    finished: Finished, store: Store, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = merges(finished, store, 3)
    assert track_or_explain(store, first, enabled=True).tracking_error
    # A run that was killed while it told of itself: written down, not struck off.
    assert second.record is not None
    unsent.put(store, second.record, f"http://127.0.0.1:{port}")
    # And one that is meant for somebody else.
    unsent.put(store, second.record, "http://somewhere-else")
    with running_mlflow(tmp_path, port) as address:
        outcome = track_or_explain(store, third, enabled=True)
        assert outcome.tracked is not None
        assert (outcome.tracking_error, outcome.sent_later) == (None, 2)
        assert [one.uri for one in unsent.waiting(store)] == ["http://somewhere-else"]
        from mlflow import MlflowClient

        client = MlflowClient(address)
        (experiment,) = client.search_experiments(filter_string="name != 'Default'")

        def parents() -> dict[str, Any]:
            found = client.search_runs([experiment.experiment_id], "tags.`bmm.model_digest` LIKE '%'")
            assert [run.info.status for run in found] == ["FINISHED"] * len(found)
            return {run.data.tags["bmm.recipe_digest"]: run for run in found}

        assert set(parents()) == {"0" * 64, "1" * 64, "2" * 64}
        by_digest = parents()
        said = {digest: run.data.metrics for digest, run in by_digest.items()}
        assert said["0" * 64] == said["1" * 64] == said["2" * 64] != {}
        for run in by_digest.values():
            assert {"merge.json", "report.html", "model"} <= {
                entry.path for entry in client.list_artifacts(run.info.run_id)
            }
        # Sent again, nothing is recorded twice.
        assert first.record is not None
        unsent.put(store, first.record, address)
        assert bmm_track(store).exit_code == 0
        found = bmm_track(store, "--any-tracker", "--json")
        assert '"waiting": []' in found.output
        assert {digest: run.info.run_id for digest, run in parents().items()} == {
            digest: run.info.run_id for digest, run in by_digest.items()
        }
    assert unsent.waiting(store) == []
