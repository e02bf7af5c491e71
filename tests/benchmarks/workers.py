"""Jobs shared out among processes that end with their parent, however it ends.

A pool of the standard library would leave its processes waiting for ever after a kill; here each has one pipe to the
parent, and an end of file on it is the end of the process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from bmm.errors import BMMError

Job = TypeVar("Job")
Outcome = TypeVar("Outcome")


def share_out(
    jobs: Sequence[Job], work: Callable[[Job], Outcome], processes: int
) -> Iterator[tuple[int, Job, Outcome]]:
    """Yield every job with its index and its outcome, as they are finished; with one process, in this one.

    `work` must be importable and its outcomes picklable; it must not raise.
    """
    if processes == 1:
        for index, job in enumerate(jobs):
            yield index, job, work(job)
        return
    context = get_context("spawn")
    waiting = list(reversed(range(len(jobs))))
    busy: dict[Any, int] = {}
    started = []
    try:
        for _ in range(min(processes, len(jobs))):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, work))
            process.start()
            theirs.close()
            started.append((process, ours))
            busy[ours] = waiting.pop()
            ours.send(jobs[busy[ours]])
        while busy:
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection)
                index = busy.pop(ready)
                try:
                    outcome = ready.recv()
                except EOFError:
                    raise BMMError(
                        f"the process at work on {jobs[index]} has ended; what it said stands above"
                    ) from None
                if waiting:
                    busy[ready] = waiting.pop()
                    ready.send(jobs[busy[ready]])
                yield index, jobs[index], outcome
    finally:
        for process, ours in started:
            ours.close()
            if busy:
                process.terminate()
            process.join()


def _serve(jobs: Connection, work: Callable[[Any], Any]) -> None:
    with suppress(EOFError, OSError, KeyboardInterrupt):
        while True:
            jobs.send(work(jobs.recv()))
