"""Which models the MLflow registry holds on to: those with an alias that people and deployments go by.

The artefact store knows nothing of MLflow, so what must not be pruned is told by the digests of models.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from bmm.errors import OutputError
from bmm.store import Store
from tasks.addresses import without_credentials
from tasks.tracking import MODEL_TAG, quiet_mlflow, reason_of, tracking_uri

ALIASES = ("champion", "previous", "challenger")


def protected_models(store: Store) -> set[str]:
    """Return the digests of the models that the registry has under one of the `ALIASES`; none without a registry.

    Raises:
        OutputError: there is a registry, and it does not answer; what is in use is then unknown.
    """
    uri = os.environ.get("MLFLOW_REGISTRY_URI") or tracking_uri(store)
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        return set()
    quiet_mlflow()
    from mlflow import MlflowClient

    try:
        return _aliased(MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or uri, uri))
    except Exception as error:
        # MLflow's errors quote the whole URI.
        raise OutputError(
            f"the model registry at {without_credentials(uri)} does not answer ({reason_of(error)}), so nobody knows "
            "which models are in use; start it, or prune with --no-registry"
        ) from None


def _aliased(client: Any) -> set[str]:
    found: set[str] = set()
    token: str | None = None
    while True:
        page = client.search_registered_models(page_token=token)
        for model in page:
            versions = {str(model.aliases[alias]) for alias in ALIASES if alias in model.aliases}
            found |= {digest for version in versions if (digest := _digest(client, model.name, version))}
        token = page.token
        if not token:
            return found


def _digest(client: Any, name: str, version: str) -> str | None:
    """Return the digest of a version's model: from its own tag, else from that of the run that made it."""
    known = client.get_model_version(name, version)
    said = known.tags.get(MODEL_TAG)
    if said is None and known.run_id:
        said = client.get_run(known.run_id).data.tags.get(MODEL_TAG)
    return None if said is None else str(said)
