"""Copies of an object store's artefacts in a folder of this machine: fetched once, checked on every use.

Files that are here already under their name and digest are not fetched again, whatever became of the others.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from bmm.disk import explained
from bmm.errors import ArtefactDamagedError
from bmm.store import Artefact
from bmm.stores.bucket import Bucket, each
from bmm.stores.folder import Folder

_COPY_OF = "copy-of-"


def prefix_of(kind: str, key: str) -> str:
    """Return where the bucket has an artefact's objects."""
    return f"artefacts/{kind}/{key}"


class Copies:
    """Copies in a folder.

    Args:
        folder: where they are.
        bucket: what they are of.
    """

    def __init__(self, folder: Folder, bucket: Bucket) -> None:
        self._folder = folder
        self._bucket = bucket

    def of(self, manifest: Mapping[str, Any], what: str) -> Artefact:
        """Return the copy of an artefact, checked; made or mended if need be.

        Args:
            manifest: as it is in the bucket now.
            what: begins every message.

        Raises:
            ArtefactDamagedError: the bucket has other bytes than the manifest promises, or none.
            OutputError: the disk or the bucket refuses.
        """
        kind, key = manifest["kind"], manifest["key"]
        found = self._whole(manifest)
        if found is not None:
            return found
        with explained(self._folder.root), self._locked(kind, key):
            found = self._whole(manifest)
            if found is not None:
                return found
            with self._folder.drafted(f"{_COPY_OF}{kind}", key) as draft:
                self._fetch(manifest, draft.path, what)
                return self._folder.settle(draft.path, manifest)

    def _whole(self, manifest: Mapping[str, Any]) -> Artefact | None:
        try:
            found = self._folder.load(manifest["kind"], manifest["key"])
        except (FileNotFoundError, ArtefactDamagedError):
            return None
        if found.manifest != manifest:
            return None
        self._folder.touch(manifest["kind"], manifest["key"])
        return found

    def _fetch(self, manifest: Mapping[str, Any], target: Path, what: str) -> None:
        """Bring an artefact's files into a folder, those that are here already from here."""
        here = self._folder.place(manifest["kind"], manifest["key"])
        prefix = prefix_of(manifest["kind"], manifest["key"])

        def fetch(item: tuple[str, Mapping[str, Any]]) -> None:
            name, expected = item
            file = target / name
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                if self._folder.holds(here / name, expected):
                    os.link(here / name, file)
                    return
            except OSError:
                file.unlink(missing_ok=True)
            digest = self._bucket.download(f"{prefix}/{expected['sha256']}", expected["bytes"], file)
            if digest != expected["sha256"]:
                raise ArtefactDamagedError(f"{what} has a damaged file, {name}")

        each(fetch, list(manifest["files"].items()))

    def settle(self, draft: Path, manifest: Mapping[str, Any]) -> Artefact:
        """Make a copy of a draft, by renaming it."""
        with self._locked(manifest["kind"], manifest["key"]):
            return self._folder.settle(draft, manifest)

    def remove(self, before: float, *, dry_run: bool) -> tuple[int, int]:
        """Remove copies that were last used before a time; return how many and their bytes."""
        gone = []
        for entry in self._folder.entries():
            if entry.used >= before:
                continue
            with self._folder.locked_if_free(f"{_COPY_OF}{entry.kind}", entry.key) as free:
                if free and not dry_run:
                    self._folder.remove(entry.kind, entry.key)
            if free:
                gone.append(entry)
        return len(gone), sum(entry.bytes for entry in gone)

    def _locked(self, kind: str, key: str) -> AbstractContextManager[None]:
        # Not the key's own lock: that may be held by this very process, which is about to make the artefact.
        return self._folder.locked(f"{_COPY_OF}{kind}", key)
