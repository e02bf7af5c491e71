"""Adding up Gram shards in the background, while workers compute others: one thread, a block at a time.

What is added and in which order is `bmm.grams.sums`; here is when. Whoever hands in shards faster than they are added
is kept waiting, so that no more than some blocks of them lie in the store; what goes wrong in the thread is raised
where the next shard is handed in, or at the end.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from threading import Event
from types import TracebackType

from bmm.away import patiently
from bmm.grams import blocks
from bmm.grams.sums import RunningSum


class Summing:
    """The thread, for the length of a block; at its end all is added, or, after an error, nothing more.

    Args:
        retry_seconds: how long a store that is away is waited for.
    """

    def __init__(self, retry_seconds: float) -> None:
        self._retry_seconds = retry_seconds
        self._stopped = Event()
        self._pending: deque[Future[None]] = deque()

    def __enter__(self) -> Summing:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="bmm-sums")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._wait(0)
        finally:
            self._stopped.set()
            self._pool.shutdown(cancel_futures=True)

    def take(self, running: RunningSum) -> None:
        """Add what is there of a sum's next shards in whole blocks, later; waits while too many blocks wait.

        Raises:
            Exception: whatever went wrong with what was taken before.
        """
        while (block := running.block()) is not None:
            add = partial(running.add, block, self._carry_on)
            # The thread tells people what its starter would.
            self._pending.append(
                self._pool.submit(copy_context().run, patiently, add, self._retry_seconds, self._pause)
            )
            self._wait(blocks.BEHIND)
        while self._pending and self._pending[0].done():
            self._wait(len(self._pending) - 1)

    def _wait(self, left: int) -> None:
        """Wait until no more than so many blocks are waiting or being added."""
        while len(self._pending) > left:
            self._pending.popleft().result()

    def _carry_on(self) -> None:
        if self._stopped.is_set():
            raise CancelledError

    def _pause(self, seconds: float) -> None:
        self._stopped.wait(seconds)
        self._carry_on()
