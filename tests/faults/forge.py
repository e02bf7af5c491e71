"""A Dask cluster whose processes are there to be killed: a scheduler by its own command, workers that are replaced.

The workers are forks of one process that has imported what they compute with, so that replacing one takes a moment
rather than seconds. Run as a script, this module is that process.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

import psutil


class Forge:
    """A scheduler and workers at one address.

    Args:
        folder: for their logs.
        workers: how many there always are.
    """

    def __init__(self, folder: Path, workers: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
        self._folder = folder
        self._workers = workers

    def __enter__(self) -> Forge:
        self._scheduler = self._start_scheduler()
        words = [sys.executable, __file__, self.address, str(self._workers)]
        with (self._folder / "workers.log").open("w") as log:
            self._supervisor = subprocess.Popen(words, stdout=log, stderr=log)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        children = self.workers()
        for process in (self._supervisor, self._scheduler):
            process.kill()
            process.wait()
        psutil.wait_procs(children, timeout=20)

    def wait(self) -> None:
        """Wait until every worker is there."""
        from distributed import Client

        with Client(self.address, timeout=120) as client:
            client.wait_for_workers(self._workers, timeout=120)

    def workers(self) -> list[psutil.Process]:
        """Return the worker processes, the oldest first."""
        return sorted(psutil.Process(self._supervisor.pid).children(), key=lambda process: process.pid)

    def replace_scheduler(self, seconds: float) -> None:
        """Kill the scheduler, and start another at the same address after a while."""
        self.kill_scheduler()
        time.sleep(seconds)
        self._scheduler = self._start_scheduler()

    def kill_scheduler(self) -> None:
        """Kill the scheduler for good."""
        self._scheduler.kill()
        self._scheduler.wait()

    def _start_scheduler(self) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", self.address, "--no-dashboard"]
        with (self._folder / "scheduler.log").open("a") as log:
            return subprocess.Popen(words, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})


def supervise(address: str, count: int) -> None:
    """Keep `count` workers alive until this process is killed."""
    # What the forks shall have: these take longer than a shard does.
    import sklearn.metrics  # noqa: F401
    import transformers.models.bert.modeling_bert
    import transformers.models.bert.tokenization_bert  # noqa: F401

    import bmm.grams.shards  # noqa: F401

    running: set[int] = set()
    while True:
        while len(running) < count:
            child = os.fork()
            if not child:
                serve(address)
            running.add(child)
        running.remove(os.wait()[0])


def serve(address: str) -> None:
    """Be a worker until the scheduler has gone."""
    import ctypes

    from distributed import Worker

    # The worker ends with its supervisor, however that ends.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)

    async def live() -> None:
        async with Worker(address, nthreads=1, dashboard=False, death_timeout=60) as worker:
            await worker.finished()

    try:
        asyncio.run(live())
    finally:
        os._exit(0)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    supervise(sys.argv[1], int(sys.argv[2]))
