"""Starting or reaching the Dask workers: local processes of our own, or a scheduler that is running already.

What is asked of them is `bmm.cluster.run`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from distributed import Client, LocalCluster

from bmm.cluster.settings import ClusterSettings
from bmm.errors import ClusterError, RecipeError

_CONNECT_SECONDS = 20


@contextmanager
def workers(settings: ClusterSettings) -> Iterator[Client]:
    """Yield a client of the recipe's scheduler, or of local worker processes that end with the block.

    Raises:
        RecipeError: the recipe's scheduler does not answer.
        ClusterError: the local processes do not start.
    """
    if settings.scheduler is not None:
        try:
            client = Client(settings.scheduler, timeout=_CONNECT_SECONDS)
        except (OSError, ValueError, TimeoutError) as error:
            raise RecipeError(
                f"'cluster.scheduler': no Dask scheduler answers at {settings.scheduler} ({error}); "
                "start it, or remove the key to use local workers"
            ) from None
        with client:
            yield client
        return
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
        )
    except (OSError, RuntimeError, TimeoutError) as error:
        raise ClusterError(f"the local Dask workers did not start: {error}") from error
    with cluster, Client(cluster) as client:
        yield client


def addresses(client: Client) -> list[str]:
    """Return the addresses of the workers that there are now."""
    return sorted(client.scheduler_info(n_workers=-1)["workers"])


def worker_count(client: Client) -> int:
    """Return how many workers the cluster has now, waiting for the first one."""
    try:
        client.wait_for_workers(1, timeout=_CONNECT_SECONDS)
    except TimeoutError as error:
        raise ClusterError("the Dask scheduler has no workers; start some, or remove cluster.scheduler") from error
    return len(addresses(client))
