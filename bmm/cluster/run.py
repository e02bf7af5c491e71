"""Asking the workers of a cluster: many requests, each answered, whatever happens to a worker meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from distributed import Client, KilledWorker, as_completed

from bmm.cluster.connection import addresses
from bmm.errors import BMMError, ClusterError
from bmm.progress import Bar

Answer = TypeVar("Answer")


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
    homes = addresses(client) if at_home else []
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
