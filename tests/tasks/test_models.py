"""Registered models as experts, from a real registry on sqlite."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bmm.checkpoint.reader import Checkpoint
from bmm.errors import CheckpointError
from bmm.recipe import Recipe
from bmm.sources import fingerprint_inputs
from tasks.models import register, resolve_registered


@pytest.fixture
def registry(pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A registry that holds task1 as version 1 of `expert`, under the alias `champion`."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    client = MlflowClient(uri)
    experiment = client.create_experiment("experts", artifact_location=(tmp_path / "artifacts").as_uri())
    run = client.create_run(experiment)
    client.log_artifacts(run.info.run_id, str(pico / "experts" / "task1"), "model")
    client.create_registered_model("expert")
    client.create_model_version("expert", f"{run.info.artifact_uri}/model", run.info.run_id)
    client.set_registered_model_alias("expert", "champion", "1")
    return client


@pytest.mark.parametrize("uri", ["models:/expert/1", "models:/expert@champion"])
def test_a_registered_model_is_the_expert_it_was_made_from(registry: Any, pico: Path, uri: str) -> None:
    found = resolve_registered(uri)
    assert (found.source, found.revision) == (uri, "1")
    with Checkpoint.open(found.path) as fetched, Checkpoint.open(pico / "experts" / "task1") as original:
        assert fetched.digest() == original.digest()


def test_a_recipe_may_name_one(registry: Any, pico: Path, edit_recipe: Callable[..., Path]) -> None:
    register()
    recipe = Recipe.from_yaml(pico / "recipe.yaml")
    before = fingerprint_inputs(recipe)
    experts = recipe.document()["experts"]
    experts[1]["model"] = "models:/expert@champion"
    after = fingerprint_inputs(Recipe.from_yaml(edit_recipe(pico, experts=experts)))
    assert after.experts[1].model.digest == before.experts[1].model.digest
    assert after.experts[1].model.revision == "1"


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("models:/expert", "write models:/NAME/VERSION"),
        ("models:/expert/7", "cannot be had from the registry"),
        ("models:/nobody@champion", "cannot be had from the registry"),
    ],
)
def test_what_is_not_there_is_named(registry: Any, uri: str, said: str) -> None:
    with pytest.raises(CheckpointError, match=said) as caught:
        resolve_registered(uri)
    assert uri in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_a_registry_the_user_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_REGISTRY_URI", raising=False)
    with pytest.raises(CheckpointError, match="set MLFLOW_TRACKING_URI"):
        resolve_registered("models:/expert/1")
