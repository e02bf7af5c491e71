"""The lock of a key across machines: a lease object, made on a condition, renewed while its holder lives.

S3 has no locks and no sessions; it has puts on a condition. A lease is an object that only one can make. Its holder
puts it anew every `seconds / 4`, and one that nobody has put anew for `seconds` is abandoned (its holder was killed)
and may be taken over, again on a condition. That time runs on the clock of the one who waits, so clocks need not
agree. A process that finds a lease of its own machine takes it at once: it has the key's lock in the kernel, so the
holder is dead.

A holder that cannot renew (the store was away) goes on, and another may begin the same work: a lease saves work, and
nothing is wrong without it.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from bmm.errors import BMMError
from bmm.stores.bucket import Blob, Bucket

LEASE_SECONDS = 60.0
"""A lease not renewed for so long is abandoned."""
FORGOTTEN_SECONDS = 3600.0
"""A lease not renewed for so long, by this machine's clock, belongs to nobody who could be asked."""


@dataclass
class _Held:
    path: str
    owner: str
    tag: str
    renewed: float
    beat: int = 0
    lost: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


class Leases:
    """The leases of one process on one bucket.

    Args:
        bucket: where they are.
        hasty: the same, with little patience, for what is not worth waiting for.
        machine: a name that all processes share which share the kernel's locks with this one.
        seconds: after how long without renewal a lease is abandoned; the same for all who use the bucket.
    """

    def __init__(self, bucket: Bucket, hasty: Bucket, machine: str, seconds: float = LEASE_SECONDS) -> None:
        self._bucket = bucket
        self._hasty = hasty
        self._machine = machine
        self._seconds = seconds
        self._held: dict[str, _Held] = {}
        self._guard = threading.Lock()
        self._renewing: threading.Thread | None = None

    @contextmanager
    def held(self, name: str) -> Iterator[None]:
        """Hold a lease for the block, once nobody else does; the caller has the kernel's lock of the same name."""
        held = self._take(name, wait=True)
        try:
            yield
        finally:
            if held is not None:
                self._give_back(held)

    @contextmanager
    def held_if_free(self, name: str) -> Iterator[bool]:
        """Hold a lease for the block unless somebody else does; yields whether it is held."""
        held = self._take(name, wait=False)
        try:
            yield held is not None
        finally:
            if held is not None:
                self._give_back(held)

    def forgotten(self) -> list[str]:
        """Return the paths of leases that nobody has renewed for an hour."""
        return [one.path for one in self._bucket.list("leases") if one.modified < time.time() - FORGOTTEN_SECONDS]

    def _take(self, name: str, *, wait: bool) -> _Held | None:
        path, owner = f"leases/{name}.json", uuid.uuid4().hex
        seen: str | None = None
        since, pause = 0.0, self._seconds / 120
        while True:
            asked = time.monotonic()
            blob = self._bucket.read(path)
            if blob is None:
                tag = self._bucket.create(path, self._content(owner, 0))
            elif self._abandoned(blob) or (blob.tag == seen and asked - since >= self._seconds):
                tag = self._bucket.replace(path, self._content(owner, 0), blob.tag)
            elif not wait:
                return None
            else:
                tag = None
                if blob.tag != seen:
                    seen, since = blob.tag, asked
            if tag is not None:
                return self._keep(_Held(path, owner, tag, asked))
            if blob is not None:
                time.sleep(pause)
                pause = min(2 * pause, self._seconds / 30)

    def _abandoned(self, blob: Blob) -> bool:
        try:
            said = json.loads(blob.content)["machine"]
        except (ValueError, KeyError, TypeError):
            return True
        return bool(said == self._machine) or blob.modified < time.time() - FORGOTTEN_SECONDS

    def _content(self, owner: str, beat: int) -> bytes:
        # The count makes each renewal another object: tags are digests of what an object holds.
        return json.dumps({"owner": owner, "machine": self._machine, "beat": beat}).encode()

    def _keep(self, held: _Held) -> _Held:
        with self._guard:
            self._held[held.path] = held
            if self._renewing is None:
                self._renewing = threading.Thread(target=self._renew, name="bmm-leases", daemon=True)
                self._renewing.start()
        return held

    def _give_back(self, held: _Held) -> None:
        with self._guard:
            self._held.pop(held.path, None)
        with held.lock:
            # Younger than `seconds`, nobody can have taken it over; an older one is left to be seen as abandoned.
            if held.lost or time.monotonic() - held.renewed > self._seconds / 2:
                return
            try:
                self._hasty.remove([held.path])
            except BMMError:
                # The work is done; an abandoned lease costs the next one a wait.
                return

    def _renew(self) -> None:
        while True:
            time.sleep(self._seconds / 4)
            with self._guard:
                every = list(self._held.values())
                if not every:
                    self._renewing = None
                    return
            for held in every:
                with held.lock:
                    self._renew_one(held)

    def _renew_one(self, held: _Held) -> None:
        if held.lost or self._held.get(held.path) is not held:
            return
        asked = time.monotonic()
        try:
            tag = self._hasty.replace(held.path, self._content(held.owner, held.beat + 1), held.tag)
        except BMMError:
            return
        if tag is None:
            held.lost = True
            return
        held.beat, held.tag, held.renewed = held.beat + 1, tag, asked
