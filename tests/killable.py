"""Processes that a test kills: forked from one that has done their imports, which take longer than what they do."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.process import BaseProcess

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "botorch.acquisition.logei",
        "botorch.fit",
        "botorch.models.transforms.outcome",
        "botorch.optim",
        "botorch.sampling.normal",
        "bmm.search.run",
    ]
)


def begun(target: Callable[..., None], *arguments: object) -> BaseProcess:
    """Return a running process of its own that calls a function of a test module."""
    process = _CONTEXT.Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


def ended(process: BaseProcess) -> None:
    """Kill a process, if it still runs, and wait until it has ended."""
    process.kill()
    process.join()
