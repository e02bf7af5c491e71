"""What a disk says no to, in words: full, read-only, forbidden.

Every place that writes wraps its work in `explained`, so that a full disk reads the same wherever it strikes.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bmm.errors import OutputError, UserError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def explained(target: Path) -> Iterator[None]:
    """Turn a refusal of the file system inside the block into an `OutputError` that names `target`.

    Raises:
        OutputError: the disk is full, read-only or forbidden; other errors pass unchanged.
    """
    try:
        yield
    except Exception as error:
        # A file of the user's that may not be read has its own sentence already.
        said = isinstance(error, UserError) and not isinstance(error, OutputError)
        reason = None if said else _refusal(error)
        if reason is None:
            raise
        raise OutputError(f"{target} cannot be written: {reason}") from error


def _refusal(error: BaseException | None) -> str | None:
    """Say why the disk refused, looking through the errors that libraries wrap around it."""
    while error is not None:
        code = error.errno if isinstance(error, OSError) else None
        text = str(error)
        if code in _FULL or "No space left on device" in text or "File too large" in text:
            return "the disk is full; free some space or name a folder on another disk"
        if code in _FORBIDDEN:
            return "permission denied or a read-only disk; name a folder that you may write to"
        if code == errno.ENOTDIR:
            return "a part of the path is a file; name another folder"
        error = error.__cause__ or error.__context__
    return None


def free_bytes(folder: Path) -> int:
    """Return the bytes free where `folder` is, or would be."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def sync(path: Path) -> None:
    """Force a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
