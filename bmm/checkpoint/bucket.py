"""Model folders in a bucket: `s3://bucket/prefix/NAME`, listed by their server's tags, fetched once, kept by revision.

A revision is the digest of a folder's listing (names, sizes, tags), so whether anything changed is known without moving
a byte; `s3://…/NAME@REVISION` names one and no other. Where the endpoint and the credentials come from is
`bmm.stores.address`. Nothing but what a model, its task and its rows are made of is fetched, and never a pickle.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bmm.checkpoint.allowed import check_allowed
from bmm.digest import digest_json
from bmm.disk import explained
from bmm.errors import CheckpointError, ModelAwayError, OutputError, StoreAwayError
from bmm.store import default_location
from bmm.stores.address import Address, endpoint, require_settings
from bmm.stores.bucket import Bucket, Listed, each

SCHEME = "s3://"
_SUFFIXES = (".safetensors", ".json", ".jsonl", ".txt", ".model", ".jinja", ".md", ".yaml", ".csv", ".parquet")
_MARKERS = ("config.json", "adapter_config.json")
_KEPT_SECONDS = 30 * 86400.0


@dataclass(frozen=True)
class BucketFolder:
    """A model folder in a bucket, as it is now."""

    address: Address
    files: tuple[Listed, ...]

    @property
    def name(self) -> str:
        """The last part of its address."""
        return self.address.prefix.rpartition("/")[2]

    @property
    def revision(self) -> str:
        """What changes whenever one of its files does."""
        return digest_json([[file.path, file.bytes, file.tag, file.modified] for file in self.files])[:16]

    @property
    def source(self) -> str:
        """What a recipe calls this state of it."""
        return f"{self.address}@{self.revision}"

    @property
    def path(self) -> Path:
        """Where this state of it lies on this machine, once it is fetched."""
        return _place(self.address, self.revision)

    def holds(self, name: str) -> bool:
        """Say whether there is a file of this name."""
        return any(file.path == name for file in self.files)


def folders_below(text: str, where: str) -> list[BucketFolder]:
    """Return the model folders directly below `s3://bucket/prefix`, by name.

    Args:
        text: the address.
        where: the recipe's key, for messages.

    Raises:
        CheckpointError: the address is none, or the server refuses.
        ModelAwayError: nobody answers.
    """
    with _explained(where):
        address = Address.parse(text)
        found: dict[str, list[Listed]] = {}
        for file in _listed(address):
            name, slash, rest = file.path.partition("/")
            if slash:
                found.setdefault(name, []).append(Listed(rest, file.bytes, file.modified, file.tag))
        start = f"{address.prefix}/" if address.prefix else ""
        folders = [
            BucketFolder(Address(address.bucket, f"{start}{name}"), tuple(files)) for name, files in found.items()
        ]
        return sorted((one for one in folders if any(map(one.holds, _MARKERS))), key=lambda one: one.name)


def fetch_source(source: str) -> tuple[Path, str]:
    """Return where a model folder lies once it is fetched, and its revision.

    Args:
        source: `s3://bucket/prefix/NAME`, or that with `@REVISION`.

    Raises:
        CheckpointError: it is not there, is no longer of that revision, or the server refuses.
        ModelAwayError: nobody answers.
    """
    text, _, wanted = source.partition("@")
    with _explained(source):
        address = Address.parse(text)
        if wanted and _place(address, wanted).is_dir():
            return _place(address, wanted), wanted
        folder = BucketFolder(address, tuple(_listed(address)))
        if not folder.files:
            raise CheckpointError(f"'{source}': there is nothing at that address; correct it")
        if wanted and folder.revision != wanted:
            raise CheckpointError(f"'{source}' was replaced in the bucket meanwhile; run again to use the new files")
        fetch(folder)
        return folder.path, folder.revision


def fetch(folder: BucketFolder) -> Path:
    """Bring a folder to this machine, all of it or nothing, and return where it lies.

    Raises:
        CheckpointError: a file changed while it was fetched.
        OutputError: the disk refuses.
    """
    target = folder.path
    check_allowed(target, "the model")
    if target.is_dir():
        return target
    with explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(f".{target.name}-{uuid.uuid4().hex[:8]}")
        try:
            draft.mkdir()
            bucket = Bucket(folder.address)

            def bring(file: Listed) -> None:
                (draft / file.path).parent.mkdir(parents=True, exist_ok=True)
                if bucket.download(file.path, file.bytes, draft / file.path) is None:
                    raise CheckpointError(f"{folder.address}/{file.path} was replaced while it was fetched; run again")

            each(bring, folder.files)
            if tuple(_listed(folder.address)) != folder.files:
                raise CheckpointError(f"{folder.address} was changed while it was fetched; run again")
            try:
                draft.rename(target)
            except OSError:
                # Somebody else brought the same.
                if not target.is_dir():
                    raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    _forget_old(target)
    return target


def _listed(address: Address) -> list[Listed]:
    require_settings(address)
    return [file for file in Bucket(address).list("") if _is_wanted(file.path)]


def _is_wanted(path: str) -> bool:
    parts = path.split("/")
    return path.endswith(_SUFFIXES) and not any(part in ("", ".", "..") or part.startswith(".") for part in parts)


def _place(address: Address, revision: str) -> Path:
    where = digest_json([endpoint(), str(address)])[:16]
    return default_location().parent / "experts" / where / revision / address.prefix.rpartition("/")[2]


def _forget_old(target: Path) -> None:
    """Remove earlier states of the folder that nobody has fetched for a month."""
    for other in target.parent.parent.iterdir():
        if other != target.parent and other.stat().st_mtime < time.time() - _KEPT_SECONDS:
            shutil.rmtree(other, ignore_errors=True)
    os.utime(target.parent)


@contextmanager
def _explained(where: str) -> Iterator[None]:
    """Say of an expert what the store's modules say of a store."""
    try:
        yield
    except StoreAwayError as error:
        raise ModelAwayError(_about(where, error)) from None
    except OutputError as error:
        if isinstance(error.__cause__, OSError):
            # This machine's disk.
            raise
        raise CheckpointError(_about(where, error)) from None


def _about(where: str, error: Exception) -> str:
    said = str(error).replace("for the store ", "for ").replace("the store's address", "the address")
    said = said.replace("the store ", "").replace("correct --store or BMM_STORE", "correct the address")
    return f"{where}: {said}"
