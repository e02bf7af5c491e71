"""What a person sees while a command runs: one progress bar for each piece of work, with the time left.

On a terminal the bars move; elsewhere (a log file, CI) each finished piece leaves one line. Everything goes to
standard error, so that standard output holds nothing but results.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from bmm.progress import Bar, Reporter, reporting

_WORTH_A_LINE_SECONDS = 2.0


class _TerminalBar:
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self.progress = progress
        self.task = task

    def advance(self, steps: float = 1.0) -> None:
        """Move the bar."""
        self.progress.advance(self.task, steps)

    def describe(self, text: str) -> None:
        """Change the words beside the bar."""
        self.progress.update(self.task, description=text)


class _TerminalReporter:
    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def start(self, text: str, total: float) -> Bar:
        """Show a new bar below the open ones."""
        return _TerminalBar(self._progress, self._progress.add_task(text, total=total))

    def finish(self, bar: Bar) -> None:
        """Take the bar away, leaving a line if the work took long enough to be wondered about."""
        assert isinstance(bar, _TerminalBar)  # noqa: S101 - only what start returned comes here
        task = next(task for task in self._progress.tasks if task.id == bar.task)
        self._progress.remove_task(bar.task)
        # Work inside other work is part of that one's line.
        if not self._progress.tasks and (task.elapsed or 0.0) >= _WORTH_A_LINE_SECONDS:
            self._progress.console.print(_line(task.description, task.completed, task.total, task.elapsed or 0.0))


class _LineBar:
    def __init__(self, text: str, total: float) -> None:
        self.text = text
        self.total = total
        self.done = 0.0
        self.started = time.perf_counter()

    def advance(self, steps: float = 1.0) -> None:
        """Count."""
        self.done += steps

    def describe(self, text: str) -> None:
        """Change the words."""
        self.text = text


class _LineReporter:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._open = 0

    def start(self, text: str, total: float) -> Bar:
        """Begin to count, silently."""
        self._open += 1
        return _LineBar(text, total)

    def finish(self, bar: Bar) -> None:
        """Print one line, if the work took long enough to be wondered about."""
        assert isinstance(bar, _LineBar)  # noqa: S101 - only what start returned comes here
        self._open -= 1
        elapsed = time.perf_counter() - bar.started
        if self._open == 0 and elapsed >= _WORTH_A_LINE_SECONDS:
            self._console.print(_line(bar.text, bar.done, bar.total, elapsed), soft_wrap=True)


def _line(text: str, done: float, total: float | None, seconds: float) -> str:
    count = "" if total is None or done >= total else f" ({done:.0f} of {total:.0f})"
    return f"[dim]{text}{count}, {seconds:.1f} s[/dim]"


@contextmanager
def shown(console: Console, *, quiet: bool = False) -> Iterator[None]:
    """Show the progress of everything inside the block on `console`."""
    if quiet:
        yield
        return
    if not console.is_terminal:
        with reporting(_LineReporter(console)):
            yield
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("[dim]left[/dim]"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress, reporting(_reporter(progress)):
        yield


def _reporter(progress: Progress) -> Reporter:
    return _TerminalReporter(progress)
