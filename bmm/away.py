"""A store that is away, a disk that is not mounted for a while, is told apart from one that is wrong, and waited for.

A store away looks like one that is empty, so something that it is known to hold is looked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from bmm.errors import StoreAwayError
from bmm.progress import tell
from bmm.store import Reference, Store

Outcome = TypeVar("Outcome")


@contextmanager
def store_at_hand(store: Store, witness: Reference) -> Iterator[None]:
    """Run the block only while the store is there.

    Args:
        store: the artefact store.
        witness: an artefact that it holds.

    Raises:
        StoreAwayError: nothing is seen of the store before the block, or after something failed in it.
    """
    _look(store, witness)
    try:
        yield
    except Exception as error:
        _look(store, witness, error)
        raise


def _look(store: Store, witness: Reference, cause: Exception | None = None) -> None:
    try:
        found = store.find(witness.kind, witness.key)
    except OSError:
        found = None
    # One artefact that is missing from a store that is there is damage, not absence.
    if found is None and store.is_away():
        raise away(store) from cause


def away(store: Store) -> StoreAwayError:
    """Return the error that says so of a store."""
    return StoreAwayError(f"the store {store.root} is not there any more; is its disk mounted?")


class Patience:
    """How long to wait for what may come back, in growing pauses; good news makes it whole again.

    Args:
        seconds: between the first failure in a row and giving up.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._since: float | None = None
        self._pause = 0.0

    @property
    def tried(self) -> bool:
        """Whether something has failed since the last good news."""
        return self._since is not None

    def pause(self) -> float | None:
        """Return the seconds to wait before the next attempt, or None if that was the last."""
        now = time.monotonic()
        if self._since is None:
            self._since, self._pause = now, 0.1
        if now - self._since >= self._seconds:
            return None
        self._pause = min(2 * self._pause, 5.0)
        return self._pause

    def renew(self) -> None:
        """Forget all failures."""
        self._since = None


def patiently(work: Callable[[], Outcome], seconds: float, sleep: Callable[[float], object] = time.sleep) -> Outcome:
    """Return what `work` returns, trying again for some seconds while the store is away.

    Args:
        work: may be begun again.
        seconds: of patience.
        sleep: passes the time between two attempts; may raise.

    Raises:
        StoreAwayError: it has not come back.
    """
    patience = Patience(seconds)
    while True:
        try:
            return work()
        except StoreAwayError as error:
            if not patience.tried:
                tell(f"{error} Trying again for {seconds:.0f} s.")
            pause = patience.pause()
            if pause is None:
                raise
            sleep(pause)
