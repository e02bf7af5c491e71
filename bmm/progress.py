"""How long-running work tells a person how far it is.

The library reports to whatever reporter the current context holds and knows nothing of terminals; the command line
installs a rich progress bar (`flows/console.py`), everybody else gets silence.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol


class Bar(Protocol):
    """One piece of work with a known number of steps."""

    def advance(self, steps: float = 1.0) -> None:
        """Report that `steps` more steps are done."""

    def describe(self, text: str) -> None:
        """Replace the text beside the bar."""


class Reporter(Protocol):
    """Where bars are shown."""

    def start(self, text: str, total: float, unit: str = "") -> Bar:
        """Open a bar of `total` steps; with a unit, how many of them a second is worth showing."""

    def tell(self, text: str) -> None:
        """Say a sentence that stays: where to look, or what went wrong and is being mended."""

    def finish(self, bar: Bar) -> None:
        """Close a bar, whether it got to its end or not."""


class _SilentBar:
    def advance(self, steps: float = 1.0) -> None:
        """Do nothing."""

    def describe(self, text: str) -> None:
        """Do nothing."""


class SilentReporter:
    """Shows nothing: the default."""

    def start(self, text: str, total: float, unit: str = "") -> Bar:  # noqa: ARG002
        """Return a bar that shows nothing."""
        return _SilentBar()

    def tell(self, text: str) -> None:
        """Do nothing."""

    def finish(self, bar: Bar) -> None:
        """Do nothing."""


_current: ContextVar[Reporter] = ContextVar("bmm_progress", default=SilentReporter())  # noqa: B039


@contextmanager
def reporting(reporter: Reporter) -> Iterator[None]:
    """Send the progress of everything inside the block to `reporter`."""
    token = _current.set(reporter)
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def progress(text: str, total: float, unit: str = "") -> Iterator[Bar]:
    """Open a bar of `total` steps on the current reporter for the length of the block.

    Args:
        text: what is being done.
        total: the number of steps.
        unit: what a step is, in the plural (`rows`), where their rate is worth showing.
    """
    reporter = _current.get()
    bar = reporter.start(text, total, unit)
    try:
        yield bar
    finally:
        reporter.finish(bar)


def tell(text: str) -> None:
    """Say a sentence that stays, through the current reporter."""
    _current.get().tell(text)
