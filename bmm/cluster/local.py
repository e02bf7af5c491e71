"""Workers as processes of this machine, which are forked from one that has imported what they all need.

Importing torch and transformers takes a worker longer than many a shard, and each of them would do so anew: at the
start, in every stage that asks for workers, and after every death. So on Linux one process imports them, once while
this one lives, and each worker is a copy of it that shares its memory (Python's `forkserver`; it has one thread, and
has touched no GPU). Elsewhere workers are started from nothing.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import active_children

import dask
from distributed import LocalCluster
from distributed.utils import get_mp_context

from bmm.cluster.settings import ClusterSettings
from bmm.errors import ClusterError
from bmm.memory import WORKER_ENVIRONMENT


@contextmanager
def local_cluster(settings: ClusterSettings) -> Iterator[tuple[LocalCluster, float]]:
    """Start workers, which end with the block.

    Yields Dask's cluster, and how many seconds it may be without a worker.

    Raises:
        ClusterError: the workers do not start.
    """
    # On macOS a fork of a process that has loaded Apple's libraries may crash.
    forked = sys.platform == "linux"
    _forget_dasks_own()
    # For as long as the cluster lives: a worker that has died is started by the same settings.
    with dask.config.set(
        {
            "distributed.worker.multiprocessing-method": "forkserver" if forked else "spawn",
            "distributed.nanny.pre-spawn-environ": {
                **dask.config.get("distributed.nanny.pre-spawn-environ"),
                **WORKER_ENVIRONMENT,
            },
        }
    ):
        if forked:
            # Without effect once the process runs.
            get_mp_context().set_forkserver_preload(["bmm.cluster.preloaded"])
        try:
            cluster = LocalCluster(
                n_workers=settings.workers,
                threads_per_worker=1,
                processes=True,
                memory_limit=settings.memory_limit.replace(" ", ""),
                host="127.0.0.1",
                # None would still take Dask's usual port, and complain where another merge has it.
                dashboard_address="127.0.0.1:0",
                silence_logs=logging.CRITICAL,
                # What they are forked from has the environment of the first time.
                env=dict(os.environ),
            )
        except (OSError, RuntimeError) as error:
            raise ClusterError(f"the local Dask workers did not start: {error}") from error
        try:
            yield cluster, settings.retry_seconds
        finally:
            _end(cluster)


def _forget_dasks_own() -> None:
    """Remove what an earlier cluster of this process has left in the environment, where what is set goes first.

    Dask writes its own settings there when it starts a worker. What differs from them was set by somebody.
    """
    usual = dask.config.get("distributed.nanny.pre-spawn-environ")
    for name in WORKER_ENVIRONMENT.keys() & usual.keys():
        if os.environ.get(name) == str(usual[name]):
            del os.environ[name]


def _end(cluster: LocalCluster) -> None:
    """Close a cluster of local processes, whatever state they are in."""
    try:
        cluster.close()
    except (AssertionError, OSError, RuntimeError):
        # A nanny that is just starting a worker anew cannot wait for it (distributed 2026.8: "can only join a started
        # process"), or one takes long to end, and closing is given up. What the block raised must not be lost for that,
        # nor a process stay behind.
        for nanny in cluster.workers.values():
            nanny.close_gracefully(reason="the merge is over")
        for child in active_children():
            if child.name.startswith("Dask Worker process"):
                child.kill()
                child.join()
