"""Digests: of files, of JSON values, of text. Everything that identifies an input goes through here."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bmm.threads import ahead

_WORTH_THREADS = 1 << 24
"""Bytes; fewer are read before threads have started."""
_PIECE = 1 << 22
"""Bytes read at once: after each Python's lock is asked for, which takes up to 5 ms while another thread works."""


def canonical_json(value: Any) -> str:
    """Return `value` as JSON with sorted keys and no spaces, so that equal values give equal text.

    Raises:
        ValueError: for NaN or infinities, which JSON does not have.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest_json(value: Any) -> str:
    """Return the SHA-256 (hexadecimal) of the canonical JSON of `value`."""
    return digest_text(canonical_json(value))


def digest_text(text: str) -> str:
    """Return the SHA-256 (hexadecimal) of `text` in UTF-8."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def digest_file(path: Path) -> str:
    """Return the SHA-256 (hexadecimal) of a file's bytes."""
    digest, piece = hashlib.sha256(), memoryview(bytearray(min(_PIECE, path.stat().st_size + 1)))
    with path.open("rb", buffering=0) as handle:
        while count := handle.readinto(piece):
            digest.update(piece[:count])
    return digest.hexdigest()


def digest_each(paths: Sequence[Path]) -> list[str]:
    """Return the SHA-256 (hexadecimal) of each file's bytes, several files at a time where they are large."""
    large = sum(path.stat().st_size for path in paths) > _WORTH_THREADS
    return list(ahead(digest_file, paths, min(len(paths), os.cpu_count() or 1) if large else 1))


def digest_files(paths: Iterable[tuple[str, Path]]) -> str:
    """Return one digest of several files under the names they are known by, whatever their order."""
    named = dict(paths)
    return digest_json(dict(zip(named, digest_each(list(named.values())), strict=True)))
