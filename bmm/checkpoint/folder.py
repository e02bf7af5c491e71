"""Replacing a published folder as a whole: built beside its place, renamed in when it is complete.

A reader sees the old folder or the new one, never a mixture, and a kill at any moment loses neither: whoever
comes next finds what the dead one left (`.NAME.bmm-new`, `.NAME.bmm-old`) and sorts it out. `flock` on
`.NAME.bmm-lock` tells the dead from the living, since the kernel lets go of it with its holder. Only folders
that hold a `merge.json` are ever replaced.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from bmm.checkpoint.allowed import check_allowed
from bmm.errors import OutputError

MARKER = "merge.json"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EACCES, errno.EPERM)
_DISK = (*_FULL, *_REFUSED, errno.EFBIG, errno.EROFS)


@dataclass(frozen=True, slots=True)
class _Places:
    """A target folder and the siblings that an attempt to replace it uses."""

    target: Path

    @property
    def new(self) -> Path:
        return self.target.with_name(f".{self.target.name}.bmm-new")

    @property
    def old(self) -> Path:
        return self.target.with_name(f".{self.target.name}.bmm-old")

    @property
    def lock(self) -> Path:
        return self.target.with_name(f".{self.target.name}.bmm-lock")


def output_error(error: OSError, target: Path) -> OutputError:
    """Return one sentence for a failure to write below `target`, by its errno."""
    if error.errno in _FULL:
        return OutputError(f"{target} cannot be written: the disk is full; free some space or name another folder")
    if error.errno == errno.EFBIG:
        return OutputError(f"{target} cannot be written: a file would be larger than allowed; raise `ulimit -f`")
    if error.errno == errno.EROFS:
        return OutputError(f"{target} cannot be written: the file system is read-only; name another folder")
    if error.errno in _REFUSED:
        return OutputError(f"{target} cannot be written: permission denied; change its rights or name another folder")
    return OutputError(f"{target} cannot be written: {error.strerror or error}; name another folder")


def check_writable(target: Path) -> None:
    """Refuse early what `replacing` would refuse late; leaves nothing behind.

    Raises:
        OutputError: somebody else's folder, a file, a mount point, no permission, read-only or full disk.
        UserError: outside of `BMM_ALLOWED_FOLDERS`.
    """
    check_allowed(target, "the output folder")
    with _disk_errors(target):
        target = target.expanduser().resolve()
        _refuse_foreign(target)
        if target.is_dir() and not os.access(target, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "permission denied", str(target))
        parent = target.parent
        while not parent.exists():
            parent = parent.parent
        with tempfile.TemporaryDirectory(prefix=".bmm-", dir=parent):
            pass


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield an empty sibling that becomes `target` when the block ends well, and vanishes otherwise.

    Files and folders are synced to disk before the rename. The block must leave a `merge.json`, or the next
    attempt takes the folder for somebody else's. An `OSError` of the block about its own disk space or rights
    becomes an `OutputError`; its other exceptions pass through.

    Raises:
        OutputError: what `check_writable` refuses, another live attempt at the same folder, a full disk.
        UserError: outside of `BMM_ALLOWED_FOLDERS`.
    """
    check_allowed(target, "the output folder")
    # Undone in reverse: the new folder (unless it was renamed), the lock, parents that stayed empty.
    with ExitStack() as undo:
        with _disk_errors(target):
            places = _Places(target.expanduser().resolve())
            _refuse_foreign(places.target)
            _make_parents(places.target.parent, undo)
            undo.enter_context(_holding(places))
            _recover(places)
            _refuse_foreign(places.target)
            undo.callback(shutil.rmtree, places.new, ignore_errors=True)
            places.new.mkdir()
        try:
            yield places.new
        except (OSError, OutputError) as error:
            # What a writer says of the hidden folder is said again of the one that the user knows.
            cause = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(cause, OSError) or not _concerns(cause, places.new):
                raise
            raise output_error(cause, target) from error
        with _disk_errors(target):
            _sync_tree(places.new)
            _swap(places)


@contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    """Turn the operating system's refusals into one sentence about `target`."""
    try:
        yield
    except OSError as error:
        raise output_error(error, target) from error
    except RuntimeError as error:
        raise OutputError(f"{target} is not a usable path: {error}; name another folder") from error


def _concerns(error: OSError, folder: Path) -> bool:
    """Return whether an error is about the disk under `folder`; a failed write does not name its file."""
    if error.errno not in _DISK:
        return False
    return error.filename is None or Path(os.fsdecode(error.filename)).is_relative_to(folder)


def _refuse_foreign(target: Path) -> None:
    """Refuse a target that is not ours to replace."""
    if not target.exists():
        return
    if not target.is_dir():
        raise OutputError(f"{target} is a file; name a folder that is new, empty or an earlier output")
    if os.path.ismount(target):
        raise OutputError(f"{target} is a mount point, which cannot be replaced; name a folder inside of it")
    if not (target / MARKER).is_file() and any(target.iterdir()):
        raise OutputError(
            f"{target} is not a folder this project wrote (it has files but no {MARKER}); name a new or empty folder"
        )


def _make_parents(parent: Path, undo: ExitStack) -> None:
    """Create missing parents, to be removed again where nothing has come to stay in them."""
    missing = []
    while not parent.exists():
        missing.append(parent)
        parent = parent.parent
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        undo.callback(_remove_if_empty, folder)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


@contextmanager
def _holding(places: _Places) -> Iterator[None]:
    """Hold the target's lock file, and remove it at the end.

    Whoever unlinks does so while holding the lock, so a lock got on an unlinked file is no lock: try again.
    """
    while True:
        descriptor = os.open(places.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, places.lock):
                break
        except BlockingIOError:
            os.close(descriptor)
            raise OutputError(
                f"another run is writing {places.target} now; wait for it to end or name another folder"
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    try:
        yield
    finally:
        places.lock.unlink(missing_ok=True)
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _recover(places: _Places) -> None:
    """Sort out what a killed attempt left; the caller holds the lock and has refused foreign targets."""
    if places.old.exists():
        if (places.target / MARKER).is_file():
            shutil.rmtree(places.old)
        else:
            if places.target.exists():
                places.target.rmdir()
            places.old.rename(places.target)
            _sync(places.target.parent)
    if places.new.exists():
        shutil.rmtree(places.new)


def _swap(places: _Places) -> None:
    """Move the old folder aside and the new one in, then remove the old one."""
    replaces = places.target.exists()
    if replaces:
        places.target.rename(places.old)
        _sync(places.target.parent)
    try:
        places.new.rename(places.target)
    except BaseException:
        if replaces:
            places.old.rename(places.target)
        raise
    _sync(places.target.parent)
    # The new folder is in place: what cannot be removed now is left to the next attempt.
    shutil.rmtree(places.old, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            file = Path(root, name)
            if not file.is_symlink():
                _sync(file)
        _sync(Path(root))


def _sync(path: Path) -> None:
    """Wait until a file's or folder's content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
