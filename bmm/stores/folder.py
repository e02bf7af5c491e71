"""A folder on this machine with whole artefacts, and what it takes to make more: drafts, progress, locks.

An artefact is written to a draft folder and renamed into place when it is whole. A lock per key, held by the kernel
for as long as its process lives, keeps two processes from working at the same artefact. What is found here is checked
to the last byte, once for each state of a file.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from bmm.digest import digest_file
from bmm.disk import explained, sync
from bmm.errors import ArtefactDamagedError
from bmm.store import Artefact, Draft, Entry, Reference
from bmm.stores.locks import locked_file
from bmm.stores.manifest import MANIFEST, files_of, made_at, manifest_text, read_manifest, unchecked

_SETTLED_SECONDS = 60.0
"""A lock file so young may be one that its maker is about to take."""


class Folder:
    """Artefacts in `root`, which is made on the first write.

    Args:
        root: the folder.
        cache: it may be made anew whenever it is gone; nothing in it is the only one of its kind.
    """

    def __init__(self, root: Path, *, cache: bool = False) -> None:
        self.root = root
        self._cache = cache
        self._seen = False
        self._verified: dict[Path, tuple[int, int, int]] = {}

    def place(self, kind: str, key: str) -> Path:
        """Return the folder of an artefact, whether it is there or not."""
        return self.root / "artefacts" / kind / key

    # -- reading ---------------------------------------------------------------------------------------------

    def load(self, kind: str, key: str) -> Artefact:
        """Return an artefact, every byte checked.

        Raises:
            FileNotFoundError: it is not there.
            ArtefactDamagedError: it is not what was written.
        """
        path, what = self.place(kind, key), f"the {kind} artefact {key[:12]}"
        manifest = read_manifest(path, what)
        for name, expected in manifest["files"].items():
            if not self.holds(path / name, expected):
                raise ArtefactDamagedError(f"{what} has a damaged file, {(path / name).name}")
        self._seen = True
        return Artefact(Reference(kind, key, manifest["digest"]), path, manifest)

    def holds(self, path: Path, expected: Mapping[str, Any]) -> bool:
        """Say whether a file has the size and the digest that a manifest promises.

        Raises:
            FileNotFoundError: it is not there.
        """
        if self._verified.get(path) == _mark(path):
            return True
        if path.stat().st_size != expected["bytes"] or digest_file(path) != expected["sha256"]:
            return False
        self._verified[path] = _mark(path)
        return True

    def forget(self) -> None:
        """Check everything again from now on."""
        self._verified.clear()

    def touch(self, kind: str, key: str) -> None:
        """Note that an artefact was used: its manifest's modification time says when that last happened."""
        # A read-only store keeps no such note.
        with suppress(OSError):
            os.utime(self.place(kind, key) / MANIFEST)

    def entries(self) -> list[Entry]:
        """Return every artefact, whether it is whole or not, by kind and key."""
        found = []
        for path in sorted((self.root / "artefacts").glob("*/*")):
            # One that somebody removes meanwhile is none any more.
            with suppress(FileNotFoundError):
                found.append(self._entry(path))
        return found

    def _entry(self, path: Path) -> Entry:
        manifest = path / MANIFEST
        size = sum((path / name).stat().st_size for name in files_of(path))
        state = (manifest if manifest.exists() else path).stat()
        said = unchecked(manifest.read_text(encoding="utf-8", errors="replace")) if manifest.exists() else {}
        return Entry(path.parent.name, path.name, size, made_at(said, state.st_mtime), state.st_mtime, path, said)

    def keys(self, kind: str) -> list[str]:
        """Return the keys of one kind, in order."""
        return sorted(path.name for path in (self.root / "artefacts" / kind).glob("*"))

    def used(self, kind: str, key: str) -> float:
        """Return when an artefact was last used, in seconds since 1970; 0 if there is none."""
        manifest = self.place(kind, key) / MANIFEST
        return manifest.stat().st_mtime if manifest.exists() else 0.0

    # -- making ----------------------------------------------------------------------------------------------

    @contextmanager
    def drafted(self, kind: str, key: str, *, fresh: bool = False) -> Iterator[Draft]:
        """Give a draft, which goes if the block fails or does not `settle` it; the caller holds the key's lock.

        Args:
            kind: of the artefact.
            key: of the artefact.
            fresh: forget the progress of earlier attempts too.
        """
        progress = self.root / "progress" / f"{kind}-{key}"
        if fresh and progress.exists():
            shutil.rmtree(progress)
        self._remove_drafts(kind, key)
        folder = self.root / "drafts" / f"{kind}-{key}-{uuid.uuid4().hex[:8]}"
        self._make_folder(folder)
        try:
            yield Draft(folder, progress)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._remove_drafts(kind, key)
        shutil.rmtree(progress, ignore_errors=True)

    def settle(self, draft: Path, manifest: Mapping[str, Any], *, lasting: bool = True) -> Artefact:
        """Rename a draft folder into its place with its manifest, durably if it is to last."""
        kind, key = manifest["kind"], manifest["key"]
        final = self.place(kind, key)
        if lasting:
            for name in manifest["files"]:
                sync(draft / name)
            _write_durably(draft / MANIFEST, manifest_text(manifest))
        else:
            (draft / MANIFEST).write_text(manifest_text(manifest), encoding="utf-8")
        self._make_folder(final.parent)
        if final.exists():
            final.rename(draft.with_name(draft.name + "-replaced"))
        draft.rename(final)
        if lasting:
            sync(final.parent)
        for name in manifest["files"]:
            self._verified[final / name] = _mark(final / name)
        return Artefact(Reference(kind, key, manifest["digest"]), final, manifest)

    @contextmanager
    def locked(self, kind: str, key: str) -> Iterator[None]:
        """Hold a key's lock, once nobody else does.

        Raises:
            OutputError: the disk refuses.
        """
        with ExitStack() as stack:
            with explained(self.root):
                self._make_folder(self.root / "locks")
                stack.enter_context(locked_file(self._lock(kind, key)))
            yield

    @contextmanager
    def locked_if_free(self, kind: str, key: str) -> Iterator[bool]:
        """Hold a key's lock unless somebody else does; yields whether it is held.

        Raises:
            FileNotFoundError: there is no such store; it is not made for a lock.
        """
        if self._cache:
            self._make_folder(self.root)
        (self.root / "locks").mkdir(exist_ok=True)
        with locked_file(self._lock(kind, key), wait=False) as held:
            yield held

    def living(self, kind: str) -> list[str]:
        """Return the keys of one kind whose locks somebody holds, and forget the locks of the dead."""
        held = []
        for file in sorted((self.root / "locks").glob(f"{kind}-*.lock")):
            key = file.name.removeprefix(f"{kind}-").removesuffix(".lock")
            with self.locked_if_free(kind, key) as free:
                if not free:
                    held.append(key)
                elif file.stat().st_mtime < time.time() - _SETTLED_SECONDS:
                    file.unlink(missing_ok=True)
        return held

    # -- clearing up -----------------------------------------------------------------------------------------

    def remove(self, kind: str, key: str) -> None:
        """Remove an artefact; the caller holds the key's lock."""
        place = self.place(kind, key)
        # The manifest goes first: a kill in the middle must not leave something that looks whole.
        (place / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(place, ignore_errors=True)

    def remove_leftovers(self) -> int:
        """Remove drafts whose makers are dead; return how many."""
        removed = 0
        for left in sorted((self.root / "drafts").glob("*")):
            kind, _, key = left.name.removesuffix("-replaced").rsplit("-", 1)[0].rpartition("-")
            with self.locked_if_free(kind, key) as free:
                if free:
                    shutil.rmtree(left, ignore_errors=True)
                    removed += 1
        return removed

    def remove_traces(self, before: float) -> int:
        """Remove progress and lock files of artefacts that nobody has worked on since a time; return of how many."""
        removed = 0
        for left in sorted((self.root / "progress").glob("*")):
            kind, _, key = left.name.rpartition("-")
            with self.locked_if_free(kind, key) as free:
                if free and max(path.stat().st_mtime for path in (left, *left.rglob("*"))) < before:
                    shutil.rmtree(left, ignore_errors=True)
                    removed += 1
        for file in sorted((self.root / "locks").glob("*.lock")):
            kind, _, key = file.name.removesuffix(".lock").rpartition("-")
            # Gone already: somebody else is clearing up.
            with suppress(FileNotFoundError):
                if file.stat().st_mtime < before:
                    with self.locked_if_free(kind, key) as free:
                        if free:
                            # Whoever waits for it sees that the file is gone, and makes another (`locked_file` does).
                            file.unlink()
        return removed

    def _make_folder(self, folder: Path) -> None:
        """Make a folder of the store, and the store with the first one."""
        if not self._seen or self._cache:
            self.root.mkdir(parents=True, exist_ok=True)
        # A store that has been read from and is away now, its disk unmounted say, must not be made anew in its place,
        # nor be taken for there because something made the folder of a file that it wrote.
        if self._seen and not self._cache and not (self.root / "artefacts").is_dir():
            raise FileNotFoundError(errno.ENOENT, "the store is not there any more", str(self.root))
        for part in reversed([folder, *folder.parents[: len(folder.relative_to(self.root).parts) - 1]]):
            part.mkdir(exist_ok=True)

    def _remove_drafts(self, kind: str, key: str) -> None:
        """Remove what a killed attempt left; the caller holds the key's lock, so nobody is writing there."""
        for left in (self.root / "drafts").glob(f"{kind}-{key}-*"):
            shutil.rmtree(left, ignore_errors=True)

    def _lock(self, kind: str, key: str) -> Path:
        return self.root / "locks" / f"{kind}-{key}.lock"


def _mark(path: Path) -> tuple[int, int, int]:
    state = path.stat()
    return state.st_size, state.st_mtime_ns, state.st_ino


def _write_durably(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
