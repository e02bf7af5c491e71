"""Experts and bases out of the MLflow registry: `models:/NAME/VERSION` and `models:/NAME@ALIAS`.

What an alias points to is looked up once, at the start of a run, and the version goes on record. The library knows
nothing of MLflow; this resolver is handed to it (`register`).
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from bmm.checkpoint.resolve import Resolved, register_scheme
from bmm.disk import explained
from bmm.errors import CheckpointError, ModelAwayError
from bmm.store import default_location
from tasks.addresses import without_credentials

_URI = re.compile(r"models:/+(?P<name>[^/@]+)(?:/(?P<version>\d+)|@(?P<alias>[^/@]+))")
_NOT_THERE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "NOT_FOUND")


def register() -> None:
    """Let recipes name registered models."""
    register_scheme("models", resolve_registered)


def resolve_registered(uri: str) -> Resolved:
    """Fetch a registered model into the user's cache folder and return where it lies, with its version.

    Raises:
        CheckpointError: the URI is malformed, no registry is configured, or the registry has no such model.
        ModelAwayError: the registry does not answer.
    """
    match = _URI.fullmatch(uri)
    if match is None:
        raise CheckpointError(f"'{uri}' is not a registered model; write models:/NAME/VERSION or models:/NAME@ALIAS")
    registry = os.environ.get("MLFLOW_REGISTRY_URI") or os.environ.get("MLFLOW_TRACKING_URI")
    if not registry:
        raise CheckpointError(f"'{uri}' needs a model registry; set MLFLOW_TRACKING_URI to its address")
    import mlflow
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client = MlflowClient(registry_uri=registry)
    name = match["name"]
    try:
        if match["alias"]:
            version = client.get_model_version_by_alias(name, match["alias"])
        else:
            version = client.get_model_version(name, match["version"])
        target = default_location().parent / "models" / name / str(version.version)
        with explained(target):
            target.mkdir(parents=True, exist_ok=True)
            path = mlflow.artifacts.download_artifacts(artifact_uri=version.source, dst_path=str(target))
    except (MlflowException, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].replace(registry, "the registry")
        said = f"'{uri}' cannot be had from the registry {without_credentials(registry)}: {reason}"
        known = getattr(error, "error_code", "") in _NOT_THERE
        raise (CheckpointError(said) if known else ModelAwayError(said)) from None
    return Resolved(Path(path), uri, str(version.version))
