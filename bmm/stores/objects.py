"""The store on an object store, `s3://bucket/prefix`, with verified copies in a folder of this machine.

Stages read artefacts as files (memory-mapped weights, Zarr), so the bucket is the truth and a folder in the user's
cache holds copies of what was read or made here. In the bucket, an artefact is

    artefacts/KIND/KEY/SHA256           a file, named by its content: put once, never changed
    artefacts/KIND/KEY/manifest.json    put last, on the condition that nobody else has put one meanwhile

so it is there whole or not at all, also while it is replaced: a reader has the files of the one manifest or of the
other. Equal keys give equal bytes; who comes second with a manifest takes the first's. Every file is checked against
its digest when it is copied, and each copy when it is used.

What `find` returns has been copied and checked. `holds`, which only wants to know whether something has to be done,
asks for the manifest and the sizes; should the bytes turn out damaged when they are read, the manifest goes, and the
artefact counts as absent everywhere.

The lock of a key is the kernel's on this machine and a lease (`bmm.stores.lease`) among machines. The progress of an
artefact in the making stays on its machine: a run that carries on elsewhere begins that artefact anew.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from bmm.disk import explained
from bmm.errors import ArtefactDamagedError, BMMError, OutputError
from bmm.store import Artefact, Draft, Entry, Reference, Store
from bmm.stores.address import Address, require_settings
from bmm.stores.bucket import HASTE_SECONDS, Blob, Bucket, Listed, each
from bmm.stores.copies import Copies, prefix_of
from bmm.stores.folder import Folder
from bmm.stores.lease import Leases
from bmm.stores.manifest import MANIFEST, made_at, manifest_text, parse_manifest, unchecked
from bmm.stores.refusals import StoreUnreachableError

LEFTOVER_SECONDS = 86400.0
"""Files without a manifest are an upload on its way; so old, they are what a killed one has left."""
NOTED_SECONDS = 86400.0
"""An artefact's last use is noted in the bucket to the day."""


class ObjectStore(Store):
    """Artefacts under one prefix of a bucket.

    Args:
        address: of the store.
        root: the folder for copies, drafts and progress.
        fresh: make every artefact anew, once in this process, whatever is there already.
    """

    def __init__(self, address: Address, root: Path, *, fresh: bool = False) -> None:
        super().__init__(root, fresh=fresh)
        self._address = address
        self._bucket, self._hasty = Bucket(address), Bucket(address, patience=HASTE_SECONDS)
        self._folder = Folder(self.root, cache=True)
        self._copies = Copies(self._folder, self._bucket)
        self._leases: Leases | None = None

    @classmethod
    def at(cls, text: str, *, fresh: bool = False) -> ObjectStore:
        """Open the store at an address; nobody is asked yet.

        Raises:
            OutputError: the address is none, or the environment lacks what it takes.
        """
        address = Address.parse(text)
        require_settings(address)
        return cls(address, address.cache, fresh=fresh)

    @property
    def location(self) -> str:
        """The address, without endpoint and credentials: these are each process's own."""
        return str(self._address)

    def check(self) -> None:
        """Ask the bucket for something, so that a wrong name, endpoint or secret ends a command at once.

        Raises:
            OutputError: what is wrong.
        """
        try:
            self._hasty.probe()
        except StoreUnreachableError as error:
            raise OutputError(str(error)) from None

    def is_away(self) -> bool:
        """Return False: who does not answer is told apart from who has nothing."""
        return False

    def free_bytes(self) -> int | None:
        """Return None: a bucket does not say."""
        return None

    # -- reading ---------------------------------------------------------------------------------------------

    def holds(self, reference: Reference) -> bool:
        """Say whether an artefact is there, by its manifest and its files' sizes."""
        prefix = prefix_of(reference.kind, reference.key)
        try:
            manifest, blob = self._manifest(reference.kind, reference.key)
        except (FileNotFoundError, ArtefactDamagedError):
            return False
        sizes = {one.path: one.bytes for one in self._bucket.list(prefix)}
        files = manifest["files"].values()
        whole = all(sizes.get(f"{prefix}/{file['sha256']}") == file["bytes"] for file in files)
        if whole and manifest["digest"] == reference.digest:
            self._note_use(prefix, blob)
            return True
        return False

    def _load(self, kind: str, key: str) -> Artefact:
        what = f"the {kind} artefact {key[:12]}"
        manifest, blob = self._manifest(kind, key)
        while True:
            try:
                artefact = self._copies.of(manifest, what)
            except ArtefactDamagedError:
                # While the files were on their way, another manifest may have taken this one's place.
                newer, newer_blob = self._manifest(kind, key)
                if newer_blob.tag == blob.tag:
                    self._give_up(kind, key)
                    raise
                manifest, blob = newer, newer_blob
                continue
            self._note_use(prefix_of(kind, key), blob)
            return artefact

    def _used(self, reference: Reference) -> None:
        """Do nothing: whatever was loaded is noted."""

    def _manifest(self, kind: str, key: str) -> tuple[dict[str, Any], Blob]:
        what = f"the {kind} artefact {key[:12]}"
        blob = self._bucket.read(f"{prefix_of(kind, key)}/{MANIFEST}")
        if blob is None:
            raise FileNotFoundError(what)
        manifest = parse_manifest(blob.content.decode("utf-8", "replace"), what)
        if (manifest.get("kind"), manifest.get("key")) != (kind, key):
            raise ArtefactDamagedError(f"{what} has the manifest of another")
        if any(name.startswith("/") or ".." in name.split("/") for name in manifest["files"]):
            # A bucket is written by others too; a copy stays inside its folder.
            raise ArtefactDamagedError(f"{what} names a file outside its folder")
        return manifest, blob

    def _give_up(self, kind: str, key: str) -> None:
        """Let nobody else believe in an artefact whose bytes are damaged."""
        try:
            self._bucket.remove([f"{prefix_of(kind, key)}/{MANIFEST}"])
        except OutputError:
            # Credentials for reading only.
            return

    def _note_use(self, prefix: str, blob: Blob) -> None:
        if blob.modified > time.time() - NOTED_SECONDS:
            return
        try:
            self._hasty.replace(f"{prefix}/{MANIFEST}", blob.content, blob.tag)
        except BMMError:
            # As in a folder: whoever may not write leaves no note.
            return

    # -- making ----------------------------------------------------------------------------------------------

    @contextmanager
    def locked(self, kind: str, key: str) -> Iterator[None]:
        """Hold the lock of one key, on this machine and among all that use the store.

        Raises:
            OutputError: the disk or the bucket refuses.
        """
        with self._folder.locked(kind, key), self._lease().held(f"{kind}-{key}"):
            yield

    def _lease(self) -> Leases:
        if self._leases is None:
            file = self.root / "machine"
            with explained(self.root), self._folder.locked("machine", "name"):
                if not file.exists():
                    file.write_text(uuid.uuid4().hex, encoding="utf-8")
                name = file.read_text(encoding="utf-8")
            self._leases = Leases(self._bucket, self._hasty, name)
        return self._leases

    @contextmanager
    def _drafted(self, kind: str, key: str) -> Iterator[tuple[Draft, Callable[[Mapping[str, Any]], Reference]]]:
        before = self._bucket.read(f"{prefix_of(kind, key)}/{MANIFEST}")
        with self._folder.drafted(kind, key, fresh=self.fresh) as draft:
            yield draft, partial(self._keep, draft.path, before)

    def _keep(self, draft: Path, before: Blob | None, manifest: Mapping[str, Any]) -> Reference:
        """Put a draft's files into the bucket, then its manifest, if that has not changed since `before`."""
        kind, key = manifest["kind"], manifest["key"]
        prefix = prefix_of(kind, key)
        contents = {expected["sha256"]: name for name, expected in manifest["files"].items()}
        each(lambda item: self._bucket.upload(f"{prefix}/{item[0]}", draft / item[1]), list(contents.items()))
        place, text = f"{prefix}/{MANIFEST}", manifest_text(manifest).encode()
        tag = self._bucket.create(place, text) if before is None else self._bucket.replace(place, text, before.tag)
        if tag is None:
            winner = self.find(kind, key)
            # None: what came between is damaged, or gone again.
            return winner or self._keep(draft, self._bucket.read(place), manifest)
        if before is not None:
            old = _files_named_by(before)
            self._bucket.remove([f"{prefix}/{content}" for content in sorted(old - contents.keys())])
        return self._copies.settle(draft, manifest).reference

    # -- housekeeping ----------------------------------------------------------------------------------------

    def entries(self) -> list[Entry]:
        """Return every artefact that has a manifest, by kind and key."""

        def entry(item: tuple[tuple[str, str], Mapping[str, Listed]]) -> Entry | None:
            (kind, key), objects = item
            blob = self._bucket.read(objects[MANIFEST].path)
            if blob is None:
                return None
            said = unchecked(blob.content.decode("utf-8", "replace"))
            size = sum(one.bytes for one in objects.values())
            place = self._folder.place(kind, key)
            return Entry(kind, key, size, made_at(said, blob.modified), blob.modified, place, said)

        listed = [item for item in self._listed().items() if MANIFEST in item[1]]
        return [one for one in each(entry, listed) if one is not None]

    def keys(self, kind: str) -> list[str]:
        """Return the keys of one kind that have a manifest, in order."""
        names = (one.path.split("/") for one in self._bucket.list(f"artefacts/{kind}"))
        return sorted(parts[2] for parts in names if parts[3:] == [MANIFEST])

    def living(self, kind: str) -> list[str]:
        """Return the keys of one kind whose locks somebody holds, here or elsewhere; forget those of the dead."""
        start, end = f"leases/{kind}-", ".json"
        found = [one.path for one in self._bucket.list("leases") if one.path.startswith(start)]
        held = self._folder.living(kind)
        for key in (path.removeprefix(start).removesuffix(end) for path in found):
            if key in held:
                continue
            with self._lease().held_if_free(f"{kind}-{key}") as free:
                if not free:
                    held.append(key)
        return sorted(held)

    def verify(self) -> list[tuple[Entry, str]]:
        """Read every artefact in the bucket and return those that are damaged, each with what is wrong."""
        damaged = []
        for entry in self.entries():
            try:
                manifest, _ = self._manifest(entry.kind, entry.key)
            except FileNotFoundError:
                continue
            except ArtefactDamagedError as error:
                damaged.append((entry, str(error)))
                continue
            names = self._damaged_files(manifest)
            # Or somebody has removed it meanwhile.
            if names and self._bucket.read(f"{prefix_of(entry.kind, entry.key)}/{MANIFEST}") is not None:
                damaged.append((entry, f"the {entry.kind} artefact {entry.key[:12]} has a damaged file, {names[0]}"))
        return damaged

    def _damaged_files(self, manifest: Mapping[str, Any]) -> list[str]:
        prefix = prefix_of(manifest["kind"], manifest["key"])

        def good(expected: Mapping[str, Any]) -> bool:
            promised: str = expected["sha256"]
            return self._bucket.download(f"{prefix}/{promised}", expected["bytes"], None) == promised

        answers = each(good, list(manifest["files"].values()))
        return [name for name, whole in zip(manifest["files"], answers, strict=True) if not whole]

    def discard(self, kind: str, key: str, *, used_since: float | None = None) -> bool:
        """Remove the artefact with this key, if it is there and nobody is at work on it, here or elsewhere."""
        prefix = prefix_of(kind, key)
        blob = self._bucket.read(f"{prefix}/{MANIFEST}")
        if blob is None or (used_since is not None and blob.modified > used_since):
            return False
        with self._folder.locked_if_free(kind, key) as free_here:
            if not free_here:
                return False
            with self._lease().held_if_free(f"{kind}-{key}") as free:
                if free:
                    # The manifest goes first: a kill in the middle must not leave something that looks whole.
                    self._bucket.remove([f"{prefix}/{MANIFEST}"])
                    self._bucket.remove([one.path for one in self._bucket.list(prefix)])
                    self._folder.remove(kind, key)
                return free

    def remove_leftovers(self) -> int:
        """Remove drafts on this machine whose makers are dead; return how many."""
        return self._folder.remove_leftovers()

    def remove_traces(self, before: float) -> int:
        """Remove progress and lock files, on this machine, that nobody has touched since a time; return of how many."""
        return self._folder.remove_traces(before)

    def remove_uploads(self) -> int:
        """Remove files in the bucket that no manifest names, a day after they came, and leases of the dead."""
        before, left = time.time() - LEFTOVER_SECONDS, []
        for objects in self._listed().values():
            blob = self._bucket.read(objects[MANIFEST].path) if MANIFEST in objects else None
            named = {MANIFEST} if blob is None else {MANIFEST, *_files_named_by(blob)}
            left += [one.path for name, one in objects.items() if name not in named and one.modified < before]
        left += self._lease().forgotten()
        self._bucket.remove(left)
        return len(left)

    def remove_copies(self, before: float, *, dry_run: bool = False) -> tuple[int, int]:
        """Remove copies on this machine that were last used before a time; return how many and their bytes."""
        return self._copies.remove(before, dry_run=dry_run)

    def _listed(self) -> dict[tuple[str, str], dict[str, Listed]]:
        """Return the bucket's artefacts by kind and key, each with its objects by their last name."""
        found: dict[tuple[str, str], dict[str, Listed]] = {}
        for one in self._bucket.list("artefacts"):
            parts = one.path.split("/")
            if len(parts) == len(("artefacts", "kind", "key", "name")):
                found.setdefault((parts[1], parts[2]), {})[parts[3]] = one
        return dict(sorted(found.items()))


def _files_named_by(manifest: Blob) -> set[str]:
    try:
        return {file["sha256"] for file in json.loads(manifest.content)["files"].values()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return set()
