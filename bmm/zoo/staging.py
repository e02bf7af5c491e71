"""Temporary folders beside the place where their content will go, and moving them there whole.

A killed process cannot clean up; whoever next works in the same place removes what the dead left.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def scratch(parent: Path, name: str) -> Iterator[Path]:
    """Yield an empty folder `.NAME.PID.new` in `parent` that vanishes with the block unless it is published.

    Raises:
        OSError: `parent` cannot be made or written.
    """
    make_folder(parent)
    for left in parent.glob(f".{name}.*.new"):
        process = left.name.removeprefix(f".{name}.").removesuffix(".new")
        if process.isdecimal() and not _alive(int(process)):
            shutil.rmtree(left, ignore_errors=True)
    folder = parent / f".{name}.{os.getpid()}.new"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def make_folder(folder: Path) -> None:
    """Make `folder` and its parents where they are missing.

    Raises:
        OSError: it cannot be made; `NotADirectoryError` where a file is in the way.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from None


def publish(folder: Path, target: Path) -> None:
    """Rename `folder` to `target`, in place of what was there."""
    if target.exists():
        shutil.rmtree(target)
    folder.rename(target)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
