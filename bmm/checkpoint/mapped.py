"""Safetensors files that are read a tensor at a time without staying in memory.

safetensors maps a file into memory, and every page that was ever looked at counts as the process's until the file is
closed: a model that is read from end to end would lie in memory as a whole. So a file is opened anew after so many
bytes; tensors that are still in use keep their pages, the others' go. What the names mean is the callers'.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

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
        return list(self._handle.keys())

    def tensor(self, name: str) -> Tensor:
        """Return one tensor in its stored dtype; it must not be written to."""
        with self._lock:
            if self._given > self._most_bytes:
                if self._state() != self._mark:
                    raise OSError("it was replaced while it was in use")
                self._handle = self._open()
                self._given = 0
            tensor: Tensor = self._handle.get_tensor(name)
            self._given += tensor.nbytes
            return tensor

    def rest(self) -> None:
        """Let go of the file until the next tensor is asked for."""
        with self._lock:
            self._handle = None
            self._given = self._most_bytes + 1

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
