"""Objects under one prefix of a bucket: read, put on a condition, moved in parts, listed, removed; with patience.

Servers' errors (5xx), resets and silence are waited out, with pauses that grow and are never quite the same; each
request first by obstore itself, then as a whole for `PATIENCE_SECONDS`. Everything here may be asked twice: files are
named by their content, and an object put on a condition is looked at again when the answer was lost. What a server
refuses becomes one sentence without its own words, which may quote a key.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, GenericError, PreconditionError
from obstore.store import S3Store

from bmm.stores.address import Address, named_endpoint, plain_http
from bmm.stores.refusals import not_a_store, refusal, require_bucket, too_short, unreachable

if TYPE_CHECKING:
    from obstore import GetOptions

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 120.0
HASTE_SECONDS = 8.0
"""For a first look, and for what is not worth waiting for."""
_LONGEST_PAUSE_SECONDS = 5.0
PART_BYTES = 8 * 2**20
_PARTS = 9_000
_AT_ONCE = 4
_UPLOADS_AT_ONCE = 2

Answer = TypeVar("Answer")
Item = TypeVar("Item")


@dataclass(frozen=True)
class Blob:
    """A small object: its bytes, the server's tag of this state of it, when it was put (seconds since 1970)."""

    content: bytes
    tag: str
    modified: float


@dataclass(frozen=True)
class Listed:
    """An object as a listing has it; `path` is below the prefix, `tag` the server's for this state of it."""

    path: str
    bytes: int
    modified: float
    tag: str = ""


@lru_cache(maxsize=8)
def _client(address: Address, _process: int, _environment: tuple[tuple[str, str], ...], retries: int) -> S3Store:
    # Connections are kept for the process; a changed environment or a fork has its own.
    named = named_endpoint()
    return S3Store(
        address.bucket,
        prefix=address.prefix or None,
        # Of several variables the client would take another one than messages name.
        config={} if named is None else {"endpoint": named},
        client_options={
            "allow_http": plain_http(),
            "connect_timeout": timedelta(seconds=5),
            "read_timeout": timedelta(seconds=60),
            # Of one request, which moves one part.
            "timeout": timedelta(seconds=300),
        },
        retry_config={
            "max_retries": retries,
            "retry_timeout": timedelta(seconds=30),
            "backoff": {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=5), "base": 3},
        },
    )


class Bucket:
    """The objects under an address.

    Args:
        address: bucket and prefix.
        patience: how many seconds without a sensible answer are too many.
    """

    def __init__(self, address: Address, *, patience: float = PATIENCE_SECONDS) -> None:
        self.address = address
        self._patience = patience

    @property
    def _store(self) -> S3Store:
        environment = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
        return _client(self.address, os.getpid(), environment, 6 if self._patience > HASTE_SECONDS else 2)

    def probe(self) -> None:
        """Ask for a listing, which only a bucket can answer.

        Raises:
            OutputError: it is not there, or refuses.
            StoreUnreachableError: nobody answers sensibly.
        """

        def ask() -> None:
            try:
                next(iter(obstore.list(self._store, "leases/none")), None)
            except FileNotFoundError as error:
                require_bucket(error, self.address)
                raise not_a_store(self.address) from None

        self._patiently(ask)

    # -- small objects ---------------------------------------------------------------------------------------

    def read(self, path: str) -> Blob | None:
        """Return a small object, None if there is none."""

        def ask() -> Blob | None:
            try:
                found = obstore.get(self._store, path)
                meta = found.meta
                return Blob(bytes(found.bytes()), meta["e_tag"] or "", meta["last_modified"].timestamp())
            except FileNotFoundError as error:
                require_bucket(error, self.address)
                return None

        return self._patiently(ask)

    def create(self, path: str, content: bytes) -> str | None:
        """Put a small object where there is none; return its tag, or None if there is another one."""
        return self._put(path, content, None)

    def replace(self, path: str, content: bytes, tag: str) -> str | None:
        """Put a small object in place of the one with this tag; return the new tag, or None if that one is gone."""
        return self._put(path, content, tag)

    def _put(self, path: str, content: bytes, tag: str | None) -> str | None:
        def ask() -> str | None:
            try:
                answer = obstore.put(self._store, path, content, mode="create" if tag is None else {"e_tag": tag})
                return answer["e_tag"] or ""
            except (AlreadyExistsError, PreconditionError, FileNotFoundError) as error:
                if isinstance(error, FileNotFoundError):
                    require_bucket(error, self.address)
                # The one that is there may be ours, and only the answer to an earlier attempt was lost.
                found = self.read(path)
                return found.tag if found is not None and found.content == content else None

        return self._patiently(ask)

    # -- files -----------------------------------------------------------------------------------------------

    def upload(self, path: str, file: Path) -> None:
        """Put a file, in parts if it is large; it is there as a whole or not at all."""
        part = max(PART_BYTES, -(-file.stat().st_size // _PARTS))
        self._patiently(lambda: obstore.put(self._store, path, file, chunk_size=part, max_concurrency=_UPLOADS_AT_ONCE))

    def download(self, path: str, size: int, target: Path | None) -> str | None:
        """Return the SHA-256 of an object of so many bytes, written to a file on the way if there is one to write.

        None if there is no such object, or one of another size.
        """
        digest = hashlib.sha256()
        with open(os.devnull if target is None else target, "wb") as handle:
            for start in range(0, max(size, 1), PART_BYTES):
                part = self._patiently(partial(self._part, path, start, size))
                if part is None:
                    return None
                digest.update(part)
                handle.write(part)
        return digest.hexdigest()

    def _part(self, path: str, start: int, size: int) -> bytes | None:
        options: GetOptions = {"range": (start, min(start + PART_BYTES, size))} if size else {}
        try:
            found = obstore.get(self._store, path, options=options)
        except (FileNotFoundError, GenericError) as error:
            require_bucket(error, self.address)
            if isinstance(error, GenericError) and not too_short(error):
                raise
            return None
        return bytes(found.bytes()) if found.meta["size"] == size else None

    # -- many ------------------------------------------------------------------------------------------------

    def list(self, prefix: str) -> list[Listed]:
        """Return every object below a prefix (whole path segments), by path."""

        def ask() -> list[Listed]:
            try:
                found = obstore.list(self._store, prefix, chunk_size=1000).collect()
            except FileNotFoundError as error:
                require_bucket(error, self.address)
                return []
            return [
                Listed(one["path"], one["size"], one["last_modified"].timestamp(), one["e_tag"] or "") for one in found
            ]

        return sorted(self._patiently(ask), key=lambda one: one.path)

    def remove(self, paths: Sequence[str]) -> None:
        """Remove objects; those that are gone already don't matter."""
        if paths:
            self._patiently(lambda: obstore.delete(self._store, list(paths)))

    # -- patience --------------------------------------------------------------------------------------------

    def _patiently(self, ask: Callable[[], Answer]) -> Answer:
        started, pause, attempts = time.monotonic(), 0.2, 1
        while True:
            try:
                return ask()
            except (BaseError, OSError) as error:
                refused: Exception | None = refusal(error, self.address)
                if refused is None and time.monotonic() - started > self._patience:
                    refused = unreachable(self.address, time.monotonic() - started)
            if refused is not None:
                # The server's own words stay behind.
                raise refused from None
            if attempts == 1:
                logger.warning("the store %s does not answer; trying again", self.address)
            attempts += 1
            time.sleep(pause * random.SystemRandom().uniform(0.5, 1.0))
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


def each(function: Callable[[Item], Answer], items: Sequence[Item]) -> list[Answer]:
    """Return a function's answers for some items, a few at a time in threads, in their order."""
    if len(items) < _AT_ONCE // 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="bmm-store") as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
