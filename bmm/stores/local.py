"""The store in a folder of this machine, or of a file system that several machines see."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bmm.disk import free_bytes
from bmm.errors import ArtefactDamagedError, OutputError
from bmm.store import Artefact, Draft, Entry, Reference, Store
from bmm.stores.folder import Folder
from bmm.stores.manifest import MANIFEST


class LocalStore(Store):
    """A folder of artefacts.

    Args:
        root: the folder; made on the first write.
        fresh: make every artefact anew, once in this process, whatever is there already.
    """

    def __init__(self, root: Path, *, fresh: bool = False) -> None:
        super().__init__(root, fresh=fresh)
        self._folder = Folder(self.root)

    @classmethod
    def at(cls, text: str, *, fresh: bool = False) -> LocalStore:
        """Open the store in a folder.

        Raises:
            OutputError: it cannot be a folder.
        """
        root = Path(text).expanduser()
        if root.exists() and not root.is_dir():
            raise OutputError(f"the store {root} is a file; name a folder with --store or BMM_STORE")
        above = next(parent for parent in root.absolute().parents if parent.exists())
        if not above.is_dir():
            raise OutputError(f"the store {root} lies below {above}, which is a file; name a folder with --store")
        return cls(root, fresh=fresh)

    @property
    def location(self) -> str:
        """The folder."""
        return str(self.root)

    def free_bytes(self) -> int | None:
        """Return the bytes free on the folder's disk."""
        return free_bytes(self.root)

    def entries(self) -> list[Entry]:
        """Return every artefact, whether it is whole or not, by kind and key."""
        return self._folder.entries()

    def keys(self, kind: str) -> list[str]:
        """Return the keys of one kind, in order."""
        return self._folder.keys(kind)

    def living(self, kind: str) -> list[str]:
        """Return the keys of one kind whose locks somebody holds."""
        return self._folder.living(kind)

    def verify(self) -> list[tuple[Entry, str]]:
        """Read every artefact and return those that are damaged, each with what is wrong."""
        damaged = []
        self._folder.forget()
        for entry in self.entries():
            if self._fault(entry) is not None:
                # Or somebody is removing it, or making it anew.
                with self._folder.locked_if_free(entry.kind, entry.key) as free:
                    fault = self._fault(entry) if free and entry.path.exists() else None
                if fault is not None:
                    damaged.append((entry, fault))
        return damaged

    def _fault(self, entry: Entry) -> str | None:
        """Return what is wrong with an artefact, None if nothing is."""
        try:
            self._folder.load(entry.kind, entry.key)
        except ArtefactDamagedError as error:
            return str(error)
        except FileNotFoundError:
            lost = "a file" if (entry.path / MANIFEST).exists() else "its manifest"
            return f"the {entry.kind} artefact {entry.key[:12]} has lost {lost}"
        return None

    def discard(self, kind: str, key: str, *, used_since: float | None = None) -> bool:
        """Remove the artefact with this key, if it is there and nobody is at work on it."""
        if not self._folder.place(kind, key).exists():
            return False
        with self._folder.locked_if_free(kind, key) as free:
            goes = free and (used_since is None or self._folder.used(kind, key) <= used_since)
            if goes:
                self._folder.remove(kind, key)
        return goes

    def remove_leftovers(self) -> int:
        """Remove drafts whose makers are dead; return how many."""
        return self._folder.remove_leftovers()

    def remove_traces(self, before: float) -> int:
        """Remove progress and lock files of artefacts that nobody has worked on since a time; return of how many."""
        return self._folder.remove_traces(before)

    @contextmanager
    def locked(self, kind: str, key: str) -> Iterator[None]:
        """Hold the lock of one key; the kernel drops it with the process."""
        with self._folder.locked(kind, key):
            yield

    def _load(self, kind: str, key: str) -> Artefact:
        return self._folder.load(kind, key)

    def _used(self, reference: Reference) -> None:
        self._folder.touch(reference.kind, reference.key)

    @contextmanager
    def _drafted(self, kind: str, key: str) -> Iterator[tuple[Draft, Callable[[Mapping[str, Any]], Reference]]]:
        with self._folder.drafted(kind, key, fresh=self.fresh) as draft:
            yield draft, lambda manifest: self._folder.settle(draft.path, manifest, lasting=draft.lasting).reference
