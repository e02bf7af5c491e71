"""The artefact store: content-addressed, immutable, verified on read.

An artefact is a folder of files with a manifest. Its *key* is the digest of what it is made from (stage, version,
inputs, settings) and says where it lies; its *digest* is that of its files and says what it is. It is written to a
draft folder and renamed into place when it is whole, so an artefact is there completely or not at all; on reading,
every byte is checked against the manifest, and a damaged artefact counts as absent. A lock per key, held by the
kernel for as long as its process lives, keeps two runs from making the same artefact at once.

Here live artefacts and their locks. What the stages put into them is not known here.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from bmm.digest import digest_file, digest_json
from bmm.disk import explained, sync
from bmm.errors import ArtefactDamagedError, OutputError, UserError

MANIFEST = "manifest.json"
_SCHEMA = 1


@dataclass(frozen=True)
class Reference:
    """The name of one artefact: small, printable, JSON.

    `digest` is that of the artefact's files, so equal digests mean equal bytes.
    """

    kind: str
    key: str
    digest: str

    def to_json(self) -> dict[str, str]:
        """Return the reference as plain JSON values."""
        return {"kind": self.kind, "key": self.key, "digest": self.digest}

    @classmethod
    def from_json(cls, value: Mapping[str, str]) -> Reference:
        """Read a reference back from `to_json`'s values."""
        return cls(value["kind"], value["key"], value["digest"])


@dataclass
class Draft:
    """An artefact in the making: put files under `path`; what goes into `provenance` is kept but not digested.

    `progress` is a folder beside it that outlives a kill, for stages that carry on where they stopped.
    """

    path: Path
    progress: Path
    provenance: dict[str, Any] = field(default_factory=dict)

    def write_json(self, name: str, value: Any) -> None:
        """Write `value` as indented JSON, the same bytes for the same value."""
        text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
        (self.path / name).write_text(text + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Artefact:
    """A verified artefact on disk."""

    reference: Reference
    path: Path
    manifest: Mapping[str, Any]

    def file(self, name: str) -> Path:
        """Return the path of one of the artefact's files."""
        return self.path / name

    def read_json(self, name: str) -> Any:
        """Return the value of one of the artefact's JSON files."""
        return json.loads(self.file(name).read_text(encoding="utf-8"))

    @property
    def provenance(self) -> Mapping[str, Any]:
        """When, where and with what the artefact was made."""
        return dict(self.manifest["provenance"])


@dataclass(frozen=True)
class Entry:
    """One line of a listing."""

    kind: str
    key: str
    bytes: int
    made: float
    used: float
    path: Path


def artefact_key(kind: str, version: int, inputs: Any, settings: Any) -> str:
    """Return the key of an artefact: the digest of everything it is made from."""
    return digest_json({"kind": kind, "version": version, "inputs": inputs, "settings": settings})


class Store:
    """A folder of artefacts.

    Args:
        root: the folder; made on the first write.
        fresh: make every artefact anew, once in this process, whatever is there already.
    """

    def __init__(self, root: Path, *, fresh: bool = False) -> None:
        self.root = root.resolve()
        self.fresh = fresh
        self._made: set[Path] = set()
        self._seen = False
        self._verified: dict[Path, tuple[int, int, int]] = {}

    @classmethod
    def open(cls, location: str | os.PathLike[str] | None = None, *, fresh: bool = False) -> Store:
        """Open the store at `location`, else at `BMM_STORE`, else in the user's cache folder.

        Raises:
            UserError: the location is not a folder that this version can use.
        """
        text = str(location or os.environ.get("BMM_STORE") or default_location())
        if "://" in text:
            raise UserError(f"the store {text} is not a folder; this version keeps artefacts in local folders only")
        root = Path(text).expanduser()
        if root.exists() and not root.is_dir():
            raise OutputError(f"the store {root} is a file; name a folder with --store or BMM_STORE")
        above = next(parent for parent in root.absolute().parents if parent.exists())
        if not above.is_dir():
            raise OutputError(f"the store {root} lies below {above}, which is a file; name a folder with --store")
        return cls(root, fresh=fresh)

    # -- reading ---------------------------------------------------------------------------------------------

    def find(self, kind: str, key: str) -> Reference | None:
        """Return a reference to the artefact with this key if it is there and whole, else None.

        To be found is to be used: pruning goes by when that last happened.
        """
        try:
            reference = self._load(kind, key).reference
        except (FileNotFoundError, ArtefactDamagedError):
            return None
        self._touch(self._place(kind, key))
        return reference

    def read(self, reference: Reference) -> Artefact:
        """Return the artefact behind a reference, every byte checked.

        Raises:
            ArtefactDamagedError: it is missing, damaged, or holds other bytes than the reference promises.
        """
        try:
            artefact = self._load(reference.kind, reference.key)
        except FileNotFoundError:
            raise ArtefactDamagedError(f"the {reference.kind} artefact {reference.key[:12]} is missing") from None
        if artefact.reference.digest != reference.digest:
            raise ArtefactDamagedError(f"the {reference.kind} artefact {reference.key[:12]} has been replaced")
        return artefact

    def _load(self, kind: str, key: str) -> Artefact:
        path = self._place(kind, key)
        what = f"the {kind} artefact {key[:12]}"
        manifest = read_manifest(path, what)
        for name, expected in manifest["files"].items():
            self._check(path / name, expected, what)
        self._seen = True
        return Artefact(Reference(kind, key, manifest["digest"]), path, manifest)

    def _check(self, path: Path, expected: Mapping[str, Any], what: str) -> None:
        state = path.stat()
        mark = (state.st_size, state.st_mtime_ns, state.st_ino)
        if self._verified.get(path) == mark:
            return
        if state.st_size != expected["bytes"] or digest_file(path) != expected["sha256"]:
            raise ArtefactDamagedError(f"{what} has a damaged file, {path.name}")
        self._verified[path] = mark

    # -- making ----------------------------------------------------------------------------------------------

    def obtain(
        self,
        kind: str,
        key: str,
        make: Callable[[Draft], None],
        *,
        describe: Mapping[str, Any] | None = None,
        replace: bool = False,
    ) -> tuple[Reference, bool]:
        """Return the artefact with this key and whether it was there already; make it if not.

        Args:
            kind: what it is, for example `grams`.
            key: its key, from `artefact_key`.
            make: fills a draft; called at most once, under the key's lock.
            describe: inputs and settings to keep in the manifest, for people.
            replace: make it even if it is there.

        Raises:
            OutputError: the disk refuses.
        """
        path = self._place(kind, key)
        wanted_anew = replace or (self.fresh and path not in self._made)
        found = None if wanted_anew else self.find(kind, key)
        if found is not None:
            return found, True
        with self.locked(kind, key):
            # Somebody else may have made it while this process waited for the lock.
            found = None if wanted_anew else self.find(kind, key)
            if found is not None:
                return found, True
            reference = self._make(kind, key, make, dict(describe or {}))
            self._made.add(path)
            return reference, False

    def _make(self, kind: str, key: str, make: Callable[[Draft], None], describe: dict[str, Any]) -> Reference:
        final = self._place(kind, key)
        progress = self.root / "progress" / f"{kind}-{key}"
        started = time.time()
        with explained(self.root):
            if self.fresh and progress.exists():
                shutil.rmtree(progress)
            self._remove_drafts(kind, key)
            folder = self.root / "drafts" / f"{kind}-{key}-{uuid.uuid4().hex[:8]}"
            self._make_folder(folder)
            draft = Draft(folder, progress)
            try:
                make(draft)
                manifest = _manifest(kind, key, draft, describe, time.time() - started)
                for name in manifest["files"]:
                    sync(folder / name)
                _write_durably(folder / MANIFEST, _manifest_text(manifest))
                self._make_folder(final.parent)
                if final.exists():
                    final.rename(folder.with_name(folder.name + "-replaced"))
                folder.rename(final)
                sync(final.parent)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
        self._remove_drafts(kind, key)
        shutil.rmtree(progress, ignore_errors=True)
        for name in manifest["files"]:
            state = (final / name).stat()
            self._verified[final / name] = (state.st_size, state.st_mtime_ns, state.st_ino)
        return Reference(kind, key, manifest["digest"])

    def _make_folder(self, folder: Path) -> None:
        """Make a folder of the store, and the store with the first one."""
        if not self._seen:
            self.root.mkdir(parents=True, exist_ok=True)
        # A store that has been read from and is away now, its disk unmounted say, must not be made anew in its place.
        for part in reversed([folder, *folder.parents[: len(folder.relative_to(self.root).parts) - 1]]):
            part.mkdir(exist_ok=True)

    def _remove_drafts(self, kind: str, key: str) -> None:
        """Remove what a killed attempt left; the caller holds the key's lock, so nobody is writing there."""
        for left in (self.root / "drafts").glob(f"{kind}-{key}-*"):
            shutil.rmtree(left, ignore_errors=True)

    @contextmanager
    def locked(self, kind: str, key: str) -> Iterator[None]:
        """Hold the lock of one key, of an artefact or of any other piece of work; not to be taken twice.

        Raises:
            OutputError: the disk refuses.
        """
        with explained(self.root):
            self._make_folder(self.root / "locks")
            lock = FileLock(self.root / "locks" / f"{kind}-{key}.lock")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    # -- housekeeping ----------------------------------------------------------------------------------------

    def entries(self) -> list[Entry]:
        """Return every artefact, whether it is whole or not, by kind and key."""
        found = []
        for path in sorted((self.root / "artefacts").glob("*/*")):
            manifest = path / MANIFEST
            size = sum((path / name).stat().st_size for name in _files(path))
            state = (manifest if manifest.exists() else path).stat()
            made = _made_at(manifest, state.st_mtime)
            found.append(Entry(path.parent.name, path.name, size, made, state.st_mtime, path))
        return found

    def verify(self) -> list[tuple[Entry, str]]:
        """Read every artefact and return those that are damaged, each with what is wrong."""
        damaged = []
        self._verified.clear()
        for entry in self.entries():
            try:
                self._load(entry.kind, entry.key)
            except ArtefactDamagedError as error:
                damaged.append((entry, str(error)))
            except FileNotFoundError:
                damaged.append((entry, f"the {entry.kind} artefact {entry.key[:12]} has lost its manifest"))
        return damaged

    def discard(self, kind: str, key: str) -> bool:
        """Remove the artefact with this key, if it is there and nobody is at work on it."""
        path = self._place(kind, key)
        return path.exists() and self.remove(Entry(kind, key, 0, 0.0, 0.0, path))

    def remove(self, entry: Entry) -> bool:
        """Remove one artefact, unless a process is at work on it; return whether it was removed."""
        lock = FileLock(self.root / "locks" / f"{entry.kind}-{entry.key}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
        try:
            # The manifest goes first: a kill in the middle must not leave something that looks whole.
            (entry.path / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(entry.path, ignore_errors=True)
        finally:
            lock.release()
        return True

    def remove_leftovers(self) -> int:
        """Remove drafts whose makers are dead; return how many."""
        removed = 0
        for left in sorted((self.root / "drafts").glob("*")):
            kind, _, key = left.name.removesuffix("-replaced").rsplit("-", 1)[0].rpartition("-")
            lock = FileLock(self.root / "locks" / f"{kind}-{key}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            shutil.rmtree(left, ignore_errors=True)
            lock.release()
            removed += 1
        return removed

    def _place(self, kind: str, key: str) -> Path:
        return self.root / "artefacts" / kind / key

    def _touch(self, path: Path) -> None:
        # The manifest's modification time is when the artefact was last used; a read-only store keeps none.
        try:
            os.utime(path / MANIFEST)
        except OSError:
            return


def default_location() -> Path:
    """Return the store's folder when nobody names one."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "bmm" / "store"


def read_manifest(folder: Path, what: str) -> dict[str, Any]:
    """Return the manifest of the artefact in a folder, in a store or outside, whose files are all there by name.

    Args:
        folder: the artefact's folder.
        what: begins every message.

    Raises:
        FileNotFoundError: there is no manifest.
        ArtefactDamagedError: it is not what was written, or a file is missing or too much.
    """
    text = (folder / MANIFEST).read_text(encoding="utf-8", errors="replace")
    try:
        manifest: dict[str, Any] = json.loads(text)
        files = dict(manifest["files"])
        # The text as well, so that a changed digit beyond a number's precision does not pass.
        intact = manifest["seal"] == _seal(manifest) and text == _manifest_text(manifest)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ArtefactDamagedError(f"{what} has an unreadable manifest") from None
    if not intact:
        raise ArtefactDamagedError(f"{what} has an altered manifest")
    present = set(_files(folder)) - {MANIFEST}
    if present != set(files):
        odd = sorted(present ^ set(files))[0]
        raise ArtefactDamagedError(f"{what} lacks, or has too much, the file {odd}")
    return manifest


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _manifest(kind: str, key: str, draft: Draft, describe: dict[str, Any], seconds: float) -> dict[str, Any]:
    files = {
        name: {"bytes": (draft.path / name).stat().st_size, "sha256": digest_file(draft.path / name)}
        for name in _files(draft.path)
    }
    manifest = {
        "schema": _SCHEMA,
        "kind": kind,
        "key": key,
        "made_from": describe,
        "files": files,
        "digest": digest_json(files),
        "provenance": {"made_at": time.time(), "seconds": seconds, **draft.provenance},
    }
    return {**manifest, "seal": _seal(manifest)}


def _seal(manifest: Mapping[str, Any]) -> str:
    return digest_json({name: value for name, value in manifest.items() if name != "seal"})


def _manifest_text(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=1, sort_keys=True)


def _made_at(manifest: Path, fallback: float) -> float:
    try:
        return float(json.loads(manifest.read_text(encoding="utf-8"))["provenance"]["made_at"])
    except (OSError, ValueError, KeyError, TypeError):
        return fallback


def _write_durably(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
