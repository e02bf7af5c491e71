"""Runs at work, as those who clear up see them.

A run holds a lock of its own for as long as it lives, named after the moment when it began. All that it needs it has
found or made since, and a store notes when that was; so whoever removes things leaves alone what was used since the
first of the living runs began. Which artefacts a run needs is written down nowhere, and cannot be: it finds out.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from bmm.errors import OutputError
from bmm.store import Store

_KIND = "at-work"
_NOTED_SECONDS = 86400.0 + 3600.0
"""A bucket notes the last use of an artefact to the day; and clocks may differ."""


@contextmanager
def at_work(store: Store) -> Iterator[None]:
    """Let nobody remove what the block finds and makes in a store.

    A store that may only be read has no such note; whoever may clear it up will find the run's artefacts young.
    """
    with ExitStack() as stack:
        with suppress(OutputError):
            stack.enter_context(store.locked(_KIND, f"{time.time():.0f}-{uuid.uuid4().hex[:8]}"))
        yield


def used_by_the_living(store: Store) -> float | None:
    """Return the time since which whatever was used may be needed by a run at work; None if there is none."""
    began = [float(key.partition("-")[0]) for key in store.living(_KIND)]
    return min(began) - _NOTED_SECONDS if began else None
