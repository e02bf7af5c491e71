"""Safetensors files that are read a tensor at a time without staying in memory.

safetensors maps a file into memory, and every page that was ever looked at counts as the process's until the file is
closed: a model that is read from end to end would lie in memory as a whole, in one file or in many. So a file is opened
anew after so many bytes, and where all files together have given so many, those that were read least lately are let go
of; tensors that are still in use keep their pages, the others' go. What the names mean is the callers'.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any
from weakref import ref

if TYPE_CHECKING:
    from torch import Tensor

MOST_BYTES = 128 * 2**20


class MappedFile:
    """One safetensors file; may be read from several threads.

    Args:
        path: the file.
        most_bytes: bytes of tensors that are given before the file is opened anew.

    Raises:
        OSError, safetensors.SafetensorError: it cannot be read, is damaged, or (by `tensor`) was replaced meanwhile.
    """

    def __init__(self, path: Path, most_bytes: int = MOST_BYTES) -> None:
        self.path = path
        self._most_bytes = most_bytes
        self._mark = self._state()
        self._handle = self._open()
        self._given = 0
        self._lock = Lock()

    def names(self) -> list[str]:
        """Return the names of the tensors in the file."""
        with self._lock:
            return list(self._opened().keys())

    def tensor(self, name: str) -> Tensor:
        """Return one tensor in its stored dtype; it must not be written to."""
        with self._lock:
            if self._given > self._most_bytes:
                self._handle = None
            tensor: Tensor = self._opened().get_tensor(name)
            self._given += tensor.nbytes
        for file in _given.note(self, tensor.nbytes):
            file.rest()
        return tensor

    def rest(self) -> None:
        """Let go of the file until the next tensor is asked for."""
        with self._lock:
            self._handle = None
            self._given = 0

    def _opened(self) -> Any:
        """Return the open file, called under the lock."""
        if self._handle is None:
            if self._state() != self._mark:
                raise OSError("it was replaced while it was in use")
            self._handle = self._open()
            self._given = 0
        return self._handle

    def _state(self) -> tuple[int, int, int]:
        state = self.path.stat()
        return state.st_size, state.st_mtime_ns, state.st_ino

    def _open(self) -> Any:
        from safetensors import safe_open

        return safe_open(self.path, framework="pt", device="cpu")


def mapped(paths: Iterable[Path]) -> dict[str, MappedFile]:
    """Return, by the name of each tensor in some files, the file that holds it; later files win."""
    found: dict[str, MappedFile] = {}
    for path in paths:
        file = MappedFile(path)
        found |= dict.fromkeys(file.names(), file)
    return found


class _Given:
    """What the files of this process have given since they were let go of, those read least lately first."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._bytes: dict[ref[MappedFile], int] = {}
        self._total = 0

    def note(self, file: MappedFile, size: int) -> list[MappedFile]:
        """Count what a file has just given; return the files to let go of, so that all together have given little."""
        key = ref(file, self._forget)
        beyond = []
        with self._lock:
            self._bytes[key] = self._bytes.pop(key, 0) + size
            self._total += size
            while self._total > MOST_BYTES and len(self._bytes) > 1:
                least_lately = next(iter(self._bytes))
                self._total -= self._bytes.pop(least_lately)
                if (found := least_lately()) is not None:
                    beyond.append(found)
        return beyond

    def _forget(self, key: ref[MappedFile]) -> None:
        # Where the lock is held, the collector has come in the middle of `note`, which finds the dead itself.
        if self._lock.acquire(blocking=False):
            try:
                self._total -= self._bytes.pop(key, 0)
            finally:
                self._lock.release()


_given = _Given()
