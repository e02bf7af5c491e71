"""Opening a checkpoint that must still be the one that was fingerprinted.

A merge takes minutes or hours; somebody may replace an expert meanwhile. Every stage that reads weights opens them
through here, so that what is merged is what the record says.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from bmm.checkpoint.adapter import AdapterCheckpoint, adapter_digest
from bmm.checkpoint.allowed import check_allowed
from bmm.checkpoint.reader import Checkpoint, is_adapter
from bmm.errors import CheckpointError, UserError

_WORTH_THREADS = 1 << 24
"""Bytes; fewer are read before threads have started."""
_seen: dict[Path, tuple[tuple[tuple[str, int, int, int], ...], str]] = {}


def fingerprint(checkpoint: Checkpoint) -> str:
    """Return the checkpoint's digest; files unchanged on disk since the last call are not read again."""
    if isinstance(checkpoint, AdapterCheckpoint):
        own = _remembered(checkpoint.path, checkpoint.own_files, checkpoint.own_digest)
        return adapter_digest(own, fingerprint(checkpoint.base))
    return _remembered(checkpoint.path, checkpoint.files, checkpoint.digest)


@contextmanager
def fingerprinting(folders: Iterable[Path]) -> Iterator[int]:
    """Take the digests of the models in these folders while the block runs, several at a time; `fingerprint` has them.

    Yields how many bytes that is. Folders that hold no whole model, or none that can be read, are passed over: whoever
    opens one later says what is wrong with it.
    """
    found: dict[Path, Checkpoint] = {}
    for folder in folders:
        with suppress(UserError, OSError):
            found[folder] = open_checkpoint(folder)
    size = sum(file.stat().st_size for checkpoint in found.values() for file in checkpoint.files)
    if size <= _WORTH_THREADS:
        yield 0
        return
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for checkpoint in found.values():
            pool.submit(fingerprint, checkpoint)
        try:
            yield size
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _remembered(folder: Path, files: Iterable[Path], digest: Callable[[], str]) -> str:
    marks = tuple(
        (path.name, state.st_size, state.st_mtime_ns, state.st_ino) for path in files for state in (path.stat(),)
    )
    known = _seen.get(folder)
    if known is not None and known[0] == marks:
        return known[1]
    found = digest()
    _seen[folder] = (marks, found)
    return found


def open_checkpoint(path: Path, base: Path | None = None) -> Checkpoint:
    """Open a whole model, or, where a base is given, a PEFT adapter over it.

    Raises:
        CheckpointError: neither is there, or it is damaged or of a kind that cannot be merged.
        UserError: a file lies outside of `BMM_ALLOWED_FOLDERS`.
    """
    check_allowed(path, "the model")
    if base is not None and is_adapter(path):
        return AdapterCheckpoint.over(path, Checkpoint.open(base))
    return Checkpoint.open(path)


def open_verified(path: Path, digest: str, base: Path | None = None) -> Checkpoint:
    """Open the checkpoint at `path`, over `base` if it is an adapter, if it still has this digest.

    Raises:
        CheckpointError: its files have changed since the merge began.
    """
    checkpoint = open_checkpoint(path, base)
    if fingerprint(checkpoint) != digest:
        checkpoint.close()
        raise CheckpointError(
            f"{path} was changed while the merge was running; run the merge again to use the new files"
        )
    return checkpoint
