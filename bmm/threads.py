"""Threads: how many torch computes with (sums depend on it in their last bits), and work done ahead, in order."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from threadpoolctl import ThreadpoolController

Item = TypeVar("Item")
Answer = TypeVar("Answer")


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread, torch and numpy alike, inside the block, and with as many as before after it."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _blas(len(sys.modules)).limit(limits=1):
            yield
    finally:
        torch.set_num_threads(before)


@lru_cache(maxsize=1)
def _blas(_: int) -> ThreadpoolController:
    """Return what holds the libraries that numpy computes with; looked for anew once a module has been imported."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="blas")


def ahead(function: Callable[[Item], Answer], items: Iterable[Item], threads: int) -> Iterator[Answer]:
    """Yield `function` of every item, in the items' order, with up to `threads` of them at work ahead of the reader.

    With one thread each is computed when it is asked for, in the caller's own.
    """
    if threads <= 1:
        yield from map(function, items)
        return
    pending: deque[Future[Answer]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
