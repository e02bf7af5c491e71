"""Opening a checkpoint that must still be the one that was fingerprinted.

A merge takes minutes or hours; somebody may replace an expert meanwhile. Every stage that reads weights opens them
through here, so that what is merged is what the record says.
"""

from __future__ import annotations

from pathlib import Path

from bmm.checkpoint.reader import Checkpoint
from bmm.errors import CheckpointError

_seen: dict[Path, tuple[tuple[tuple[str, int, int, int], ...], str]] = {}


def fingerprint(checkpoint: Checkpoint) -> str:
    """Return the checkpoint's digest; files unchanged on disk since the last call are not read again."""
    marks = tuple(
        (path.name, state.st_size, state.st_mtime_ns, state.st_ino)
        for path in (*checkpoint.weight_files, *checkpoint.support_files)
        for state in (path.stat(),)
    )
    known = _seen.get(checkpoint.path)
    if known is not None and known[0] == marks:
        return known[1]
    digest = checkpoint.digest()
    _seen[checkpoint.path] = (marks, digest)
    return digest


def open_verified(path: Path, digest: str) -> Checkpoint:
    """Open the checkpoint at `path` if it still has this digest.

    Raises:
        CheckpointError: its files have changed since the merge began.
    """
    checkpoint = Checkpoint.open(path)
    if fingerprint(checkpoint) != digest:
        checkpoint.close()
        raise CheckpointError(
            f"{path} was changed while the merge was running; run the merge again to use the new files"
        )
    return checkpoint
