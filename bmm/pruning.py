"""Clearing up a store: what goes by a policy (`bmm.retention`), and what never does.

Never goes what the models of a list need (the champions of a registry, which this library does not know), what a
record that waits to be sent needs, and what a run at work may need (`bmm.stores.at_work`).
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass

from bmm.reachable import Name, Origins
from bmm.retention import Going, Retention, choose
from bmm.store import Entry, Store
from bmm.stores.at_work import used_by_the_living

UNSENT = "unsent"
"""The kind of what waits to be sent to somebody, and will be read then."""


@dataclass(frozen=True)
class Pruned:
    """What went, or would go.

    `protected` are the artefacts that stay whatever the limits, `left_bytes` all that stay; `over_bytes` says by how
    much that is more than the limit. `leftovers` are traces of killed runs.
    """

    going: list[Going]
    protected: set[Name]
    left_bytes: int
    over_bytes: int
    leftovers: int


def prune(store: Store, retention: Retention, models: Collection[str], *, dry_run: bool = False) -> Pruned:
    """Remove what a policy does not keep.

    Args:
        store: where from.
        retention: how much may stay.
        models: digests of `model` artefacts that stay, with all that their merges need.
        dry_run: only say what would go.
    """
    # First what is at work: a run that begins after the listing finds its artefacts by using them.
    now, since = time.time(), used_by_the_living(store)
    entries = store.entries()
    protected = _protected(entries, models, since)
    going = choose(entries, retention, protected, now)
    leftovers = 0
    if not dry_run:
        going = [one for one in going if store.discard(one.entry.kind, one.entry.key, used_since=one.entry.used)]
        leftovers = store.remove_leftovers() + store.remove_uploads()
        if retention.older_than_days is not None:
            leftovers += store.remove_traces(now - retention.older_than_days * 86400)
    left = sum(entry.bytes for entry in entries) - sum(one.entry.bytes for one in going)
    over = max(0, left - retention.limit) if retention.limit is not None else 0
    return Pruned(going, protected, left, over, leftovers)


def _protected(entries: list[Entry], models: Collection[str], since: float | None) -> set[Name]:
    origins = Origins(entries)
    unsent = [(entry.kind, entry.key) for entry in entries if entry.kind == UNSENT]
    young = {(entry.kind, entry.key) for entry in entries if since is not None and entry.used >= since}
    return origins.of_models(models) | origins.of(unsent) | young
