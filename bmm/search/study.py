"""The durable log of a search: one JSON line a trial, on disk as soon as the trial is finished.

Only the log lives here: how trials (`bmm.search.trial`) are written and read back exactly. Which trial comes next is
decided in `bmm.search.propose`, and `bmm.search.run` evaluates it.

Trials that are evaluated side by side are logged as they finish, so lines need not be in the order of their indices.
A line is good when it is byte for byte what this module would write for what the line says, checksum
included, and its trial is not logged before it. On opening, everything from the first line that is not good is cut
off: a write that a kill tore, a flipped bit, a line that stands twice. A trial is a pure function of those that were
finished when it was proposed, so what is cut off is found again by going on.

One process writes a study at a time; the artefact store's lock on the search stage sees to that. An
`append` that finds the file longer or shorter than it left it refuses to write.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bmm.digest import canonical_json, digest_json
from bmm.errors import BMMError, OutputError
from bmm.search.rows import decoded, encoded
from bmm.search.trial import Trial, best_of

SCHEMA = 3

logger = logging.getLogger(__name__)


class Study:
    """The trials so far, in memory and on disk alike. Made by `open`, grows by `append`."""

    def __init__(self, path: Path, trials: list[Trial], size: int) -> None:
        self._path = path
        self._trials = {trial.index: trial for trial in trials}
        self._size = size

    @property
    def path(self) -> Path:
        """The log file."""
        return self._path

    @property
    def trials(self) -> tuple[Trial, ...]:
        """Every trial on disk, by index; those that were under way beside them at a kill are missing."""
        return tuple(self._trials[index] for index in sorted(self._trials))

    def __contains__(self, index: int) -> bool:
        return index in self._trials

    def __getitem__(self, index: int) -> Trial:
        return self._trials[index]

    @property
    def best(self) -> Trial | None:
        """The complete trial with the highest objective, the earliest of equals."""
        return best_of(self.trials)

    @classmethod
    def open(cls, path: str | Path, identity: Mapping[str, Any]) -> Study:
        """Open the study at `path`, or begin one; damage from its first bad line on is cut off.

        `identity` is what the trials depend on (model and data digests, space, seed); only its digest is
        kept. A log whose very header is damaged holds nothing that can be trusted and begins again, empty.

        Raises:
            BMMError: the log belongs to another identity or was written by another version.
            OutputError: the file cannot be created or shortened.
        """
        path = Path(path)
        header = _line("header", {"schema": SCHEMA, "identity": digest_json(dict(identity))})
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return cls._begin(path, header)
        except OSError as error:
            raise OutputError(f"the study log {path} cannot be read: {error.strerror}") from error
        first, newline, rest = content.partition(b"\n")
        written = _read(first + newline, "header")
        if written is None:
            logger.warning("the header of the study log %s is damaged; the search starts over", path)
            return cls._begin(path, header)
        if first + newline != header:
            raise BMMError(
                f"the study log {path} belongs to another search (other inputs, space or seed); "
                "use another file, or remove it to start over"
            )
        trials, size = _read_trials(rest)
        size += len(header)
        if size < len(content):
            logger.warning(
                "the study log %s is damaged after %d trials; its last %d bytes are cut off",
                path,
                len(trials),
                len(content) - size,
            )
            _shorten(path, size)
        return cls(path, trials, size)

    @classmethod
    def _begin(cls, path: Path, header: bytes) -> Study:
        temporary = path.with_name(path.name + ".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as handle:
                handle.write(header)
                handle.flush()
                os.fsync(handle.fileno())
            temporary.replace(path)
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise OutputError(f"the study log {path} cannot be created: {error.strerror}") from error
        return cls(path, [], len(header))

    def append(self, trial: Trial) -> None:
        """Add a trial; it is on disk when this returns.

        Raises:
            BMMError: the trial is there already, or another process has changed the file.
            OutputError: the file cannot be written; the trials before it are kept.
        """
        if trial.index in self._trials:
            raise BMMError(f"trial {trial.index} is in the study {self._path} already")
        line = _line("trial", _logged(trial))
        try:
            # Unbuffered, so that closing after a failure does not write what was left of the line.
            with self._path.open("ab", buffering=0) as handle:
                if os.fstat(handle.fileno()).st_size != self._size:
                    raise BMMError(f"the study log {self._path} was changed by another process; run one at a time")
                try:
                    left = memoryview(line)
                    while left:
                        left = left[handle.write(left) :]
                    os.fsync(handle.fileno())
                except OSError:
                    os.ftruncate(handle.fileno(), self._size)
                    raise
        except OSError as error:
            raise OutputError(f"the study log {self._path} cannot be written: {error.strerror}") from error
        self._trials[trial.index] = trial
        self._size += len(line)


def _logged(trial: Trial) -> dict[str, Any]:
    """Return a trial with its rows: what comes next depends on them, also after a kill."""
    return {**trial.to_json(), "gains": trial.gains and encoded(trial.gains)}


def _line(kind: str, value: dict[str, Any]) -> bytes:
    """Return one line of the log: the value under its kind, and a checksum of it."""
    text = canonical_json({kind: value, "checksum": digest_json(value)})
    # A path in an error's text may hold bytes that are not UTF-8.
    return text.encode("utf-8", "surrogatepass") + b"\n"


def _read(line: bytes, kind: str) -> dict[str, Any] | None:
    """Return the value that a line holds, or None for a line that this module would not have written."""
    try:
        value = json.loads(line.decode("utf-8", "surrogatepass"))[kind]
        return value if isinstance(value, dict) and _line(kind, value) == line else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _read_trials(content: bytes) -> tuple[list[Trial], int]:
    """Return the trials up to the first line that is not good, and the number of bytes that they take."""
    trials: list[Trial] = []
    seen: set[int] = set()
    size = 0
    for line in content.splitlines(keepends=True):
        value = _read(line, "trial")
        if value is None:
            break
        try:
            trial = replace(Trial.from_json(value), gains=value["gains"] and decoded(value["gains"]))
        except (KeyError, TypeError, ValueError, AttributeError, BMMError):
            break
        if trial.index in seen:
            break
        seen.add(trial.index)
        trials.append(trial)
        size += len(line)
    return trials, size


def _shorten(path: Path, size: int) -> None:
    try:
        with path.open("r+b") as handle:
            handle.truncate(size)
            os.fsync(handle.fileno())
    except OSError as error:
        raise OutputError(f"the study log {path} cannot be repaired: {error.strerror}") from error
