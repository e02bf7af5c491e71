"""What a person sees while a command runs: one progress bar for each piece of work, with the time left.

On a terminal the bars move; elsewhere (a log file, CI) each finished piece leaves one line. Everything goes to
standard error, so that standard output holds nothing but results.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from bmm.progress import Bar, Reporter, reporting

_WORTH_A_LINE_SECONDS = 2.0
# Where no bar moves, long work says this often how far it is.
_BETWEEN_LINES_SECONDS = 60.0


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

    def start(self, text: str, total: float, unit: str = "") -> Bar:
        """Show a new bar below the open ones."""
        return _TerminalBar(self._progress, self._progress.add_task(text, total=total, unit=unit))

    def tell(self, text: str) -> None:
        """Print a line above the bars."""
        self._progress.console.print(f"[dim]{escape(text)}[/dim]", soft_wrap=True)

    def finish(self, bar: Bar) -> None:
        """Take the bar away, leaving a line if the work took long enough to be wondered about."""
        assert isinstance(bar, _TerminalBar)  # noqa: S101 - only what start returned comes here
        task = next(task for task in self._progress.tasks if task.id == bar.task)
        self._progress.remove_task(bar.task)
        # Work inside other work is part of that one's line.
        if not self._progress.tasks and (task.elapsed or 0.0) >= _WORTH_A_LINE_SECONDS:
            unit = task.fields["unit"]
            self._progress.console.print(_line(task.description, task.completed, task.total, task.elapsed or 0.0, unit))


class _Rate(ProgressColumn):
    """Steps a second, of work whose steps are worth counting so."""

    def render(self, task: Task) -> Text:
        """Return the rate of the last half minute, or nothing."""
        unit = task.fields["unit"]
        return Text(f"{task.speed:,.0f} {unit}/s" if unit and task.speed else "", style="dim")


class _LineBar:
    def __init__(self, console: Console, text: str, total: float, unit: str) -> None:
        self.text = text
        self.total = total
        self.unit = unit
        self.done = 0.0
        self.started = self._said = time.perf_counter()
        self._console = console

    def advance(self, steps: float = 1.0) -> None:
        """Count, and say now and then how far it is."""
        self.done += steps
        now = time.perf_counter()
        if now - self._said >= _BETWEEN_LINES_SECONDS and self.done < self.total:
            self._said = now
            seconds = now - self.started
            left = seconds / self.done * (self.total - self.done)
            line = _line(self.text, self.done, self.total, seconds, self.unit, f", about {left:.0f} s left")
            self._console.print(line, soft_wrap=True)

    def describe(self, text: str) -> None:
        """Change the words."""
        self.text = text


class _LineReporter:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._open = 0

    def start(self, text: str, total: float, unit: str = "") -> Bar:
        """Begin to count."""
        self._open += 1
        return _LineBar(self._console, text, total, unit)

    def tell(self, text: str) -> None:
        """Print a line."""
        self._console.print(f"[dim]{escape(text)}[/dim]", soft_wrap=True)

    def finish(self, bar: Bar) -> None:
        """Print one line, if the work took long enough to be wondered about."""
        assert isinstance(bar, _LineBar)  # noqa: S101 - only what start returned comes here
        self._open -= 1
        elapsed = time.perf_counter() - bar.started
        if self._open == 0 and elapsed >= _WORTH_A_LINE_SECONDS:
            self._console.print(_line(bar.text, bar.done, bar.total, elapsed, bar.unit), soft_wrap=True)


def _line(text: str, done: float, total: float | None, seconds: float, unit: str = "", left: str = "") -> str:
    count = "" if total is None or done >= total else f" ({done:.0f} of {total:.0f})"
    rate = f", {done / seconds:,.0f} {unit}/s" if unit and seconds else ""
    return f"[dim]{text}{count}, {seconds:.1f} s{rate}{left}[/dim]"


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
        _Rate(),
        TimeElapsedColumn(),
        TextColumn("[dim]left[/dim]"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress, reporting(_reporter(progress)):
        yield


def _reporter(progress: Progress) -> Reporter:
    return _TerminalReporter(progress)
