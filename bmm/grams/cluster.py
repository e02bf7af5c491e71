"""The Dask workers that compute Grams: local processes of our own, or a scheduler that is running already.

Only starting, reaching and asking them lives here; what they compute is `bmm.grams.shards`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from distributed import Client, KilledWorker, LocalCluster, as_completed

from bmm.errors import BMMError, ClusterError, RecipeError
from bmm.progress import Bar
from bmm.recipe import ClusterSettings

_CONNECT_SECONDS = 20
Answer = TypeVar("Answer")


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


def worker_count(client: Client) -> int:
    """Return how many workers the cluster has now, waiting for the first one."""
    try:
        client.wait_for_workers(1, timeout=_CONNECT_SECONDS)
    except TimeoutError as error:
        raise ClusterError("the Dask scheduler has no workers; start some, or remove cluster.scheduler") from error
    return len(_addresses(client))


def run_all(
    client: Client,
    function: Callable[[dict[str, Any]], Answer],
    requests: Sequence[dict[str, Any]],
    bar: Bar | None = None,
    *,
    at_home: bool = False,
) -> list[Answer]:
    """Run `function` on every request and return the answers in the requests' order.

    A worker that dies has its requests run again elsewhere (three deaths of one request are too many), so `function`
    must be pure and must name what it writes by its content.

    Args:
        client: of the cluster.
        function: what workers do.
        requests: what they are asked, plain values.
        bar: advanced by one for each answer.
        at_home: ask the same worker at the same place each time, while it lives: it may have kept something.

    Raises:
        ClusterError: a request killed every worker that tried it.
        BMMError: whatever of ours `function` raised.
    """
    homes = _addresses(client) if at_home else []
    futures = []
    for index, request in enumerate(requests):
        home = {"workers": [homes[index % len(homes)]], "allow_other_workers": True} if homes else {}
        futures.append(client.submit(function, request, pure=False, retries=0, **home))
    place = {future.key: index for index, future in enumerate(futures)}
    answers: dict[int, Answer] = {}
    try:
        for future in as_completed(futures):
            answers[place[future.key]] = future.result()
            if bar is not None:
                bar.advance()
    except KilledWorker as error:
        raise ClusterError(
            "a piece of work killed every worker that tried it (out of memory?); "
            "raise cluster.memory_limit, or lower grams.shard_rows or the calibration rows"
        ) from error
    except BMMError:
        client.cancel(futures)
        raise
    return [answers[index] for index in range(len(requests))]


def _addresses(client: Client) -> list[str]:
    return sorted(client.scheduler_info(n_workers=-1)["workers"])
