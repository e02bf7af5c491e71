"""Times and memory taken so that a ratio survives a busy machine: by turns, several times over, medians with spread."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from tempfile import TemporaryFile
from typing import Any


def seconds(function: Callable[[], object]) -> float:
    """Return how long a call takes."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def by_turns(functions: Mapping[str, Callable[[], float]], repetitions: int) -> dict[str, list[float]]:
    """Call each function in turn, all of them so many times, and return what each has returned."""
    found: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repetitions):
        # The other way round every other time, so that none has the first place's luck.
        order = list(functions) if turn % 2 == 0 else list(functions)[::-1]
        for name in order:
            found[name].append(functions[name]())
    return found


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Return the median of the ratios of measurements taken beside each other, and the least and the largest."""
    ratios = [own / other for own, other in zip(ours, theirs, strict=True)]
    return {"median": median(ratios), "low": min(ratios), "high": max(ratios)}


@dataclass(frozen=True)
class Run:
    """A finished process: its wall-clock seconds, its peak resident bytes, and the JSON object that it printed last.

    The peak is at least what this process had when it started the other, so whoever asks should be small.
    """

    seconds: float
    peak_rss_bytes: int
    said: Any


def run(command: Sequence[str], *, environment: Mapping[str, str] | None = None, threads: int | None = None) -> Run:
    """Run a command in a process of its own and return what it took.

    Args:
        command: the program, or the arguments of Python where it begins with a dash.
        environment: variables to add.
        threads: of each library in it; by default as many as it likes.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    words = [sys.executable, *command] if command[0].startswith("-") else list(command)
    variables = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    if threads is not None:
        variables |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    variables |= {"PYTHONPATH": os.pathsep.join(sys.path), **(environment or {})}
    with TemporaryFile("w+") as output, TemporaryFile("w+") as errors:
        started = time.perf_counter()
        process = subprocess.Popen(words, env=variables, stdout=output, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        taken = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        if process.returncode:
            raise RuntimeError(f"{' '.join(words[:4])} failed with {process.returncode}: {errors.read()[-2000:]}")
        last = output.read().strip().rpartition("\n")[2]
    return Run(taken, usage.ru_maxrss * 1024, json.loads(last) if last.startswith('{"') else {})
