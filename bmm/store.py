"""The artefact store: content-addressed, immutable, verified on read.

An artefact is a folder of files with a manifest. Its *key* is the digest of what it is made from (stage, version,
inputs, settings) and says where it lies; its *digest* is that of its files and says what it is. It is made in a draft
folder on this machine and put into the store when it is whole, so an artefact is there completely or not at all; on
reading, every byte is checked against the manifest, and a damaged artefact counts as absent. A lock per key keeps two
runs from making the same artefact at once.

Here live artefacts and the contract of a store; where it keeps them is `bmm.stores`. What the stages put into them is
not known here.
"""

from __future__ import annotations

import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bmm.digest import digest_json
from bmm.disk import explained
from bmm.errors import ArtefactDamagedError
from bmm.stores.manifest import manifest_of


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

    `progress` is a folder beside it that outlives a kill, for stages that carry on where they stopped. What is not
    `lasting` survives a kill as everything does, but is not waited for until it is on the disk: an artefact that is
    used up soon, and made again where a power failure has damaged it.
    """

    path: Path
    progress: Path
    provenance: dict[str, Any] = field(default_factory=dict)
    lasting: bool = True

    def write_json(self, name: str, value: Any) -> None:
        """Write `value` as indented JSON, the same bytes for the same value."""
        text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
        (self.path / name).write_text(text + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Artefact:
    """A verified artefact, in a folder of this machine."""

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
    """One line of a listing; `path` is the artefact's folder, or that of its copy on this machine.

    The manifest is as it was found, unchecked, and empty where it cannot be read.
    """

    kind: str
    key: str
    bytes: int
    made: float
    used: float
    path: Path
    manifest: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)


def artefact_key(kind: str, version: int, inputs: Any, settings: Any) -> str:
    """Return the key of an artefact: the digest of everything it is made from."""
    return digest_json({"kind": kind, "version": version, "inputs": inputs, "settings": settings})


class Store(ABC):
    """A place for artefacts, and how they are found, read and made there; the subclasses say where that is.

    Args:
        root: the store's folder on this machine, where drafts and progress are; made on the first write.
        fresh: make every artefact anew, once in this process, whatever is there already.
    """

    def __init__(self, root: Path, *, fresh: bool = False) -> None:
        self.root = root.resolve()
        self.fresh = fresh
        self._made: set[tuple[str, str]] = set()

    @staticmethod
    def open(location: str | os.PathLike[str] | None = None, *, fresh: bool = False) -> Store:
        """Open the store at `location`, else at `BMM_STORE`, else in the user's cache folder.

        Raises:
            UserError: the location is not one that this version can use.
        """
        text = str(location or os.environ.get("BMM_STORE") or default_location())
        # Imported here: they are stores of this kind.
        if "://" in text:
            from bmm.stores.objects import ObjectStore

            return ObjectStore.at(text, fresh=fresh)
        from bmm.stores.local import LocalStore

        return LocalStore.at(text, fresh=fresh)

    @property
    @abstractmethod
    def location(self) -> str:
        """What `open` takes to open this store, here or in another process."""

    @abstractmethod
    def free_bytes(self) -> int | None:
        """Return how much more fits into the store, None where nobody can say."""

    def check(self) -> None:  # noqa: B027 - a folder has nothing to ask
        """Ask the store whether it is there for us, so that a wrong name or secret ends a command at once.

        Raises:
            OutputError: what is wrong.
        """

    def is_away(self) -> bool:
        """Say whether nothing is seen of the store: no artefact that it had can be found, whatever it was."""
        return not (self.root / "artefacts").is_dir()

    # -- reading ---------------------------------------------------------------------------------------------

    def holds(self, reference: Reference) -> bool:
        """Say whether an artefact is there, as a reason not to make it; to be held is to be used.

        A store from which reading is dear may look at sizes alone, if damage that `read` finds ends this belief.
        """
        return self.find(reference.kind, reference.key) == reference

    def find(self, kind: str, key: str) -> Reference | None:
        """Return a reference to the artefact with this key if it is there and whole, else None.

        To be found is to be used: pruning goes by when that last happened.
        """
        try:
            reference = self._load(kind, key).reference
        except (FileNotFoundError, ArtefactDamagedError):
            return None
        self._used(reference)
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
        wanted_anew = replace or (self.fresh and (kind, key) not in self._made)
        found = None if wanted_anew else self.find(kind, key)
        if found is not None:
            return found, True
        with self.locked(kind, key):
            # Somebody else may have made it while this process waited for the lock.
            found = None if wanted_anew else self.find(kind, key)
            if found is not None:
                return found, True
            reference = self._make(kind, key, make, dict(describe or {}))
            self._made.add((kind, key))
            return reference, False

    def _make(self, kind: str, key: str, make: Callable[[Draft], None], describe: dict[str, Any]) -> Reference:
        started = time.time()
        with explained(self.root), self._drafted(kind, key) as (draft, keep):
            make(draft)
            return keep(manifest_of(draft.path, kind, key, describe, draft.provenance, time.time() - started))

    @abstractmethod
    def locked(self, kind: str, key: str) -> AbstractContextManager[None]:
        """Hold the lock of one key, of an artefact or of any other piece of work; not to be taken twice.

        Raises:
            OutputError: the disk refuses.
        """

    # -- housekeeping ----------------------------------------------------------------------------------------

    @abstractmethod
    def entries(self) -> list[Entry]:
        """Return every artefact, whether it is whole or not, by kind and key."""

    @abstractmethod
    def keys(self, kind: str) -> list[str]:
        """Return the keys of one kind, in order, whether the artefacts are whole or not."""

    @abstractmethod
    def living(self, kind: str) -> list[str]:
        """Return the keys of one kind whose locks somebody holds, and forget the locks that the dead have left."""

    @abstractmethod
    def verify(self) -> list[tuple[Entry, str]]:
        """Read every artefact and return those that are damaged, each with what is wrong."""

    @abstractmethod
    def discard(self, kind: str, key: str, *, used_since: float | None = None) -> bool:
        """Remove the artefact with this key, if it is there and nobody is at work on it; return whether it went.

        Args:
            kind: of the artefact.
            key: of the artefact.
            used_since: leave it, if it was used after that time (seconds since 1970).
        """

    @abstractmethod
    def remove_leftovers(self) -> int:
        """Remove what killed runs have left of artefacts; return how many pieces of work that was."""

    @abstractmethod
    def remove_traces(self, before: float) -> int:
        """Remove progress and lock files of artefacts that nobody has worked on since a time; return of how many."""

    def remove_uploads(self) -> int:
        """Remove what killed runs have left where others can see it; return how many files."""
        return 0

    def remove_copies(self, before: float, *, dry_run: bool = False) -> tuple[int, int]:  # noqa: ARG002
        """Remove this machine's copies of what is kept elsewhere; return how many, and their bytes.

        Args:
            before: those last used before that time, in seconds since 1970.
            dry_run: only count.
        """
        return 0, 0

    # -- what a place has to offer ---------------------------------------------------------------------------

    @abstractmethod
    def _load(self, kind: str, key: str) -> Artefact:
        """Return an artefact, every byte checked.

        Raises:
            FileNotFoundError: it is not there.
            ArtefactDamagedError: it is not what was written.
        """

    @abstractmethod
    def _used(self, reference: Reference) -> None:
        """Note that an artefact was used."""

    @abstractmethod
    def _drafted(
        self, kind: str, key: str
    ) -> AbstractContextManager[tuple[Draft, Callable[[Mapping[str, Any]], Reference]]]:
        """Give a draft, and what puts it into the store under its manifest; nothing is left of a block that fails.

        The caller holds the key's lock.
        """


def default_location() -> Path:
    """Return the store's folder when nobody names one."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "bmm" / "store"
