"""What the model registry holds on to, in a real one on a sqlite file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bmm.errors import OutputError
from bmm.retention import Retention
from bmm.store import Store
from tasks.clearing import clear
from tasks.protected import protected_models
from tasks.tracking import MODEL_TAG


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store with two models."""
    store = Store.open(tmp_path / "store")
    for key in "ab":
        store.obtain("model", key * 64, lambda draft, key=key: draft.write_json("model.json", key))
    return store


@pytest.fixture
def client(store: Store, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The registry in the store's own sqlite file."""
    (store.root / "mlflow").mkdir()
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{store.root / 'mlflow' / 'mlflow.db'}")


def register(client: Any, name: str, digest: str | None, alias: str | None, *, run_digest: str | None = None) -> None:
    """Register a version of a model, as a night that ends well does."""
    experiment = client.get_experiment_by_name("nights") or client.get_experiment(client.create_experiment("nights"))
    run = client.create_run(experiment.experiment_id, tags={MODEL_TAG: run_digest} if run_digest else {})
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    tags = {MODEL_TAG: digest} if digest else {}
    version = client.create_model_version(name, f"runs:/{run.info.run_id}/model", run.info.run_id, tags=tags)
    if alias:
        client.set_registered_model_alias(name, alias, version.version)


def test_without_a_registry_nothing_is_held(store: Store) -> None:
    assert protected_models(store) == set()
    assert not (store.root / "mlflow").exists()


def test_champions_and_those_before_them_are_held(store: Store, client: Any) -> None:
    register(client, "mail", "1" * 64, None)
    register(client, "mail", "2" * 64, "previous")
    register(client, "mail", "3" * 64, "champion")
    register(client, "news", None, "challenger", run_digest="4" * 64)
    register(client, "news", "5" * 64, "tried-by-somebody")
    register(client, "no-merge", None, "champion")
    assert protected_models(store) == {"2" * 64, "3" * 64, "4" * 64}


def test_what_a_champion_needs_is_not_cleared(store: Store, client: Any) -> None:
    kept = store.find("model", "a" * 64)
    assert kept is not None
    register(client, "mail", kept.digest, "champion")
    would = clear(store, Retention(older_than_days=0), dry_run=True)
    assert [one["key"] for one in would["removed"]] == ["b" * 64]
    assert would["removed"][0]["why"] == "age"
    assert would["kinds"] == {"model": {"artefacts": 1, "bytes": would["bytes"]}}
    assert store.keys("model") == ["a" * 64, "b" * 64]
    done = clear(store, Retention(older_than_days=0))
    assert done == would
    assert store.keys("model") == ["a" * 64]
    assert clear(store, Retention(older_than_days=0), registry=False)["artefacts"] == 1


def test_a_registry_that_does_not_answer_ends_the_clearing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(OutputError, match="--no-registry") as raised:
        clear(store, Retention(older_than_days=0))
    assert "secret" not in str(raised.value)
    assert store.keys("model") == ["a" * 64, "b" * 64]
