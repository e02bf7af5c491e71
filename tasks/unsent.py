"""Records of merges on their way to a tracker: written down before, struck off after, so none is lost in between.

A record that waits is a name, that of the merge's own record in the store (`bmm.runs`), and the tracker's address; a
tracker that was away, or a run that was killed while it told of itself, costs nothing. The next run of any recipe that
uses the same store and the same tracker sends what waits, and so does `bmm track`. What is sent twice is found by its
digest, so nothing is recorded twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from bmm.errors import ArtefactDamagedError
from bmm.progress import tell
from bmm.pruning import UNSENT
from bmm.runs import Run, read_run
from bmm.store import Draft, Reference, Store, artefact_key

_NAME = "unsent.json"


@dataclass(frozen=True)
class Waiting:
    """A record that waits; `uri` is the tracker's address without credentials, `since` in seconds since 1970."""

    key: str
    run: Reference
    uri: str
    since: float


def put(store: Store, run: Reference, uri: str) -> Waiting:
    """Let a merge's record wait for a tracker, if it does not already."""
    said = {"run": run.to_json(), "uri": uri}

    def make(draft: Draft) -> None:
        draft.write_json(_NAME, {**said, "since": time.time()})

    reference, _ = store.obtain(UNSENT, artefact_key(UNSENT, 1, said, {}), make, describe={"inputs": said})
    return Waiting(reference.key, run, uri, float(store.read(reference).read_json(_NAME)["since"]))


def remove(store: Store, one: Waiting) -> None:
    """Strike off a record that was sent."""
    store.discard(UNSENT, one.key)


def waiting(store: Store) -> list[Waiting]:
    """Return the records that wait, the oldest first."""
    found = []
    for key in store.keys(UNSENT):
        reference = store.find(UNSENT, key)
        if reference is None:
            # Struck off just now, or damaged; then its merge's next run writes it again.
            continue
        said = store.read(reference).read_json(_NAME)
        found.append(Waiting(key, Reference.from_json(said["run"]), said["uri"], float(said["since"])))
    return sorted(found, key=lambda one: (one.since, one.key))


def send(store: Store, uri: str | None, log: Callable[[Store, Run], object]) -> int:
    """Send what waits, the oldest first, and return how many records that were.

    Args:
        store: where they wait.
        uri: send only those for this tracker; None for all.
        log: sends one; what it raises ends the sending, and the rest goes on waiting.
    """
    sent = 0
    for one in waiting(store):
        if uri is not None and one.uri != uri:
            continue
        try:
            log(store, read_run(store, one.run))
        except ArtefactDamagedError:
            tell(f"The record of a merge that waited for {one.uri} is damaged or gone; its next run makes it again.")
        else:
            sent += 1
        remove(store, one)
    return sent
