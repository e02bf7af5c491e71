"""Clearing up a store, with what the model registry holds on to left alone; for the command and for deployments."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from bmm.pruning import prune
from bmm.retention import Retention
from bmm.store import Store
from tasks.protected import protected_models


def clear(store: Store, retention: Retention, *, dry_run: bool = False, registry: bool = True) -> dict[str, Any]:
    """Remove what a policy does not keep, and what killed runs left; return what went, as plain JSON values.

    Args:
        store: where from.
        retention: how much may stay.
        dry_run: only say what would go.
        registry: leave alone what the models with an alias in the MLflow registry need.

    Raises:
        OutputError: there is a registry, and it does not answer.
    """
    models = protected_models(store) if registry else set()
    pruned = prune(store, retention, models, dry_run=dry_run)
    kinds, sizes = Counter[str](), Counter[str]()
    for one in pruned.going:
        kinds[one.entry.kind] += 1
        sizes[one.entry.kind] += one.entry.bytes
    number, size = (0, 0)
    if retention.older_than_days is not None:
        number, size = store.remove_copies(_before(retention.older_than_days), dry_run=dry_run)
    return {
        "store": store.location,
        "artefacts": len(pruned.going),
        "bytes": sum(sizes.values()),
        "kinds": {kind: {"artefacts": kinds[kind], "bytes": sizes[kind]} for kind in sorted(kinds)},
        "removed": [
            {"kind": one.entry.kind, "key": one.entry.key, "bytes": one.entry.bytes, "why": one.why}
            for one in pruned.going
        ],
        "models": sorted(models),
        "protected": len(pruned.protected),
        "left_bytes": pruned.left_bytes,
        "over_bytes": pruned.over_bytes,
        "leftovers": pruned.leftovers,
        "copies": number,
        "copy_bytes": size,
    }


def clear_copies(store: Store, older_than_days: float, *, dry_run: bool = False) -> dict[str, Any]:
    """Remove this machine's copies of a bucket's artefacts that were not used for a while, and nothing else."""
    leftovers = 0 if dry_run else store.remove_leftovers()
    number, size = store.remove_copies(_before(older_than_days), dry_run=dry_run)
    return {
        "store": store.location,
        "artefacts": 0,
        "bytes": 0,
        "leftovers": leftovers,
        "copies": number,
        "copy_bytes": size,
    }


def _before(days: float) -> float:
    return time.time() - days * 86400
