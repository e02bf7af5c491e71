"""Asking the workers of a cluster: many requests, each answered once, whatever dies meanwhile.

Requests are handed out a few for each worker, so that ten thousand cost the scheduler no more than ten. One that was
lost with its worker, its scheduler or its store is asked again, which is safe because what workers do is pure and what
they write is named by its content: it is found, or computed once more.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

from distributed import Client, Future, KilledWorker
from safetensors import SafetensorError

from bmm.away import Patience
from bmm.cluster.connection import Cluster
from bmm.cluster.settings import in_flight
from bmm.errors import ArtefactDamagedError, KilledWorkersError, StoreAwayError, UserError
from bmm.progress import Bar, tell

_LOOK_SECONDS = 2.0
_WAIT_SECONDS = 0.25
_FAILURES = 3
"""How often a request may fail for a reason that is the machine's and may pass."""
_PASSING = (OSError, SafetensorError, ArtefactDamagedError)
_TRIPS = 20

Answer = TypeVar("Answer")
Asked = Callable[[dict[str, Any]], Answer]


def run_all(
    cluster: Cluster,
    function: Asked[Answer],
    requests: Sequence[dict[str, Any]],
    bar: Bar | None = None,
    *,
    at_home: bool = False,
    steps: Callable[[dict[str, Any]], float] = lambda _: 1.0,
    landed: Callable[[int, Answer], None] | None = None,
) -> list[Answer]:
    """Run `function` on every request and return the answers in the requests' order.

    A worker that dies has its requests run again elsewhere. A request that killed four workers is set aside and run
    alone when all others are answered; it is given up when it kills four again. A scheduler that went away, a cluster
    without workers and a store that is away are waited for (`cluster.retry_seconds`).

    Args:
        cluster: the workers.
        function: what workers do; pure, and what it writes is named by its content.
        requests: what they are asked, plain values.
        bar: advanced by `steps` of each request that is answered.
        at_home: ask the same worker at the same place each time, while it lives: it may have kept something.
        steps: how far a request brings the bar.
        landed: called with each request's place and answer as soon as that is here, in whatever order; while it does
            not return, nothing more is asked, and what it raises ends the run.

    Raises:
        KilledWorkersError: a request killed every worker that tried it.
        ClusterError: scheduler or workers did not come back.
        StoreAwayError: the store did not come back.
        BMMError: whatever of ours `function` raised.
    """
    return _Run(cluster, function, requests, bar, at_home, steps, landed).answers()


class _Run(Generic[Answer]):
    def __init__(
        self,
        cluster: Cluster,
        function: Asked[Answer],
        requests: Sequence[dict[str, Any]],
        bar: Bar | None,
        at_home: bool,
        steps: Callable[[dict[str, Any]], float],
        tell_landed: Callable[[int, Answer], None] | None,
    ) -> None:
        self._cluster = cluster
        self._function = function
        self._requests = requests
        self._bar = bar
        self._at_home = at_home
        self._steps = steps
        self._tell_landed = tell_landed
        self._waiting = deque(range(len(requests)))
        self._suspects: deque[int] = deque()
        self._flying: dict[Future, int] = {}
        self._alone = False
        self._landed: SimpleQueue[Future] = SimpleQueue()
        self._answers: dict[int, Answer] = {}
        self._failures: Counter[int] = Counter()
        self._fatal: BaseException | None = None
        self._store = Patience(cluster.retry_seconds)
        self._workers = Patience(cluster.start_seconds)
        self._not_before = 0.0
        self._look_at = 0.0
        self._addresses: list[str] = []
        self._lost = 0

    def answers(self) -> list[Answer]:
        """Ask until everything is answered."""
        trips = 0
        try:
            while len(self._answers) < len(self._requests) and self._fatal is None:
                try:
                    if time.monotonic() >= self._look_at:
                        self._look()
                    self._launch()
                    self._land()
                except (OSError, CancelledError, RuntimeError):
                    # The connection's: what a request raises comes as an answer. Dask may notice a moment later.
                    trips += 1
                    if self._cluster.connected:
                        if trips > _TRIPS:
                            raise
                        time.sleep(_WAIT_SECONDS)
                else:
                    trips = 0
                if not self._cluster.connected:
                    self._restore()
        finally:
            self._drop()
            if self._cluster.connected:
                # What died since the last look; a scheduler that has just gone away tells nothing.
                with suppress(OSError, RuntimeError, KeyError):
                    self._count()
        if self._fatal is not None:
            raise self._fatal
        return [self._answers[index] for index in range(len(self._requests))]

    def _look(self) -> None:
        """See how many workers there are, and wait for some if there are none."""
        self._count()
        self._look_at = time.monotonic() + _LOOK_SECONDS
        if self._addresses:
            self._workers.renew()
        elif self._workers.pause() is None:
            raise self._cluster.workerless()

    def _count(self) -> None:
        """See which workers there are, and tell how many have died."""
        before, self._addresses = self._addresses, self._cluster.addresses()
        if lost := len(set(before) - set(self._addresses)):
            self._lost += lost
            tell(f"Workers lost: {self._lost}; what they were computing is computed again.")

    def _launch(self) -> None:
        """Hand out as many requests as the workers have use for."""
        count = len(self._addresses)
        # One tells as well as many whether the store is back.
        room = 1 if self._store.tried else in_flight(count)
        if time.monotonic() < self._not_before or len(self._flying) > max(0, room - 1 - count):
            return
        batch = [self._waiting.popleft() for _ in range(min(room - len(self._flying), len(self._waiting)))]
        if not batch and not self._flying and self._suspects:
            batch = [self._suspects.popleft()]
        if not batch:
            return
        self._alone = len(batch) == 1 and not self._flying and not self._waiting
        try:
            futures = self._submit(self._cluster.client, batch)
        except BaseException:
            self._waiting.extendleft(reversed(batch))
            raise
        for index, future in zip(batch, futures, strict=True):
            self._flying[future] = index
            future.add_done_callback(self._landed.put)

    def _submit(self, client: Client, batch: Sequence[int]) -> list[Future]:
        requests = [self._requests[index] for index in batch]
        if not self._at_home:
            futures: list[Future] = client.map(self._function, requests, pure=False, retries=0)
            return futures
        return [
            client.submit(
                self._function,
                request,
                pure=False,
                retries=0,
                workers=[self._addresses[index % len(self._addresses)]] if self._addresses else None,
                allow_other_workers=bool(self._addresses),
            )
            for index, request in zip(batch, requests, strict=True)
        ]

    def _land(self) -> None:
        """Wait for what is finished, and take it."""
        try:
            landed = [self._landed.get(timeout=_WAIT_SECONDS)]
        except Empty:
            return
        while not self._landed.empty():
            landed.append(self._landed.get())
        try:
            # The others are of a connection that is gone, and wait again already.
            self._sort([future for future in landed if future in self._flying])
        except BaseException:
            for future in landed:
                self._landed.put(future)
            raise

    def _sort(self, landed: Sequence[Future]) -> None:
        finished = [future for future in landed if future.status == "finished"]
        try:
            values = self._cluster.client.gather(finished) if finished else []
        except (OSError, CancelledError, RuntimeError):
            raise
        except Exception:
            # An answer went with its worker, and the request, asked again by Dask, has failed: the future says so now.
            if all(future.status == "finished" for future in finished):
                raise
            self._sort(landed)
            return
        for future, value in zip(finished, values, strict=True):
            self._take(self._flying.pop(future), value)
        for future in landed:
            if future.status == "error":
                error = future.exception()
                self._failed(self._flying.pop(future), error)
            elif future in self._flying:
                # A scheduler that went away has forgotten it.
                self._waiting.appendleft(self._flying.pop(future))

    def _take(self, index: int, value: Answer) -> None:
        self._answers[index] = value
        self._store.renew()
        if self._bar is not None:
            self._bar.advance(self._steps(self._requests[index]))
        if self._tell_landed is not None and self._fatal is None:
            try:
                self._tell_landed(index, value)
            except Exception as error:
                # Not to be taken for an error of the connection's.
                self._fatal = error

    def _failed(self, index: int, error: BaseException) -> None:
        """Put a request that failed where it is asked again, or give up."""
        if isinstance(error, KilledWorker):
            self._suspects.append(index)
            if self._alone:
                self._fatal = KilledWorkersError(
                    "a piece of work killed every worker that tried it (out of memory?); "
                    "raise cluster.memory_limit, or lower grams.shard_rows or the calibration rows"
                )
                self._fatal.__cause__ = error
        elif isinstance(error, StoreAwayError):
            self._waiting.appendleft(index)
            if not self._store.tried:
                tell(f"{error} Trying again for {self._cluster.retry_seconds:.0f} s.")
            if time.monotonic() < self._not_before:
                # Of those that were under way together, one counts.
                return
            pause = self._store.pause()
            if pause is None:
                self._fatal = error
            else:
                self._not_before = time.monotonic() + pause
        elif isinstance(error, _PASSING) and not isinstance(error, UserError):
            self._waiting.append(index)
            self._failures[index] += 1
            if self._failures[index] >= _FAILURES:
                self._fatal = error
        else:
            self._fatal = error

    def _restore(self) -> None:
        """Reach the scheduler again; everything in flight is asked again if it is by another client."""
        before = self._cluster.client
        self._cluster.restore()
        self._look_at = 0.0
        self._addresses = []
        if self._cluster.client is not before:
            self._waiting.extendleft(reversed(self._flying.values()))
            self._flying.clear()

    def _drop(self) -> None:
        """Leave nothing to compute behind."""
        if self._flying and self._cluster.connected:
            with suppress(OSError, RuntimeError):
                self._cluster.client.cancel(list(self._flying))
        self._flying.clear()
