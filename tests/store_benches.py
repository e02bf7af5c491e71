"""Stores on a bench: opened as several processes would, and their stored bytes laid bare to be damaged."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import textwrap
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from object_server import ObjectServer

from bmm.store import Draft, Store, artefact_key
from bmm.stores.manifest import MANIFEST

KEY = artefact_key("thing", 1, {"from": "here"}, {"how": 3})


class Bench(ABC):
    """A place for a store, and a way behind its back; `location` opens it."""

    location: str
    rounds = 40
    """How often a test may do again what takes many requests."""

    def open(self, *, fresh: bool = False) -> Store:
        """Open the store as a new process would."""
        return Store.open(self.location, fresh=fresh)

    @abstractmethod
    def get(self, kind: str, key: str, name: str) -> bytes:
        """Return a file of an artefact as it is stored."""

    @abstractmethod
    def put(self, kind: str, key: str, name: str, content: bytes) -> None:
        """Overwrite a file of an artefact, and let no copy of it on this machine help out."""

    @abstractmethod
    def drop(self, kind: str, key: str, name: str) -> None:
        """Remove a file of an artefact, and let no copy of it on this machine help out."""


class LocalBench(Bench):
    """A store in a folder."""

    def __init__(self, folder: Path) -> None:
        self.location = str(folder)

    def _file(self, kind: str, key: str, name: str) -> Path:
        return Path(self.location) / "artefacts" / kind / key / name

    def get(self, kind: str, key: str, name: str) -> bytes:
        return self._file(kind, key, name).read_bytes()

    def put(self, kind: str, key: str, name: str, content: bytes) -> None:
        self._file(kind, key, name).write_bytes(content)

    def drop(self, kind: str, key: str, name: str) -> None:
        self._file(kind, key, name).unlink()


class ObjectBench(Bench):
    """A store under a prefix of a bucket of its own; the environment must name the server."""

    rounds = 6

    def __init__(self, server: ObjectServer) -> None:
        self._server = server
        self.bucket = server.new_bucket()
        self.location = f"s3://{self.bucket}/some/where"

    def path(self, kind: str, key: str, name: str) -> str:
        """Return a file's place on the server."""
        prefix = f"{self.bucket}/some/where/artefacts/{kind}/{key}"
        if name == MANIFEST:
            return f"{prefix}/{MANIFEST}"
        manifest = json.loads(self._server.ask("GET", f"{prefix}/{MANIFEST}"))
        return f"{prefix}/{manifest['files'][name]['sha256']}"

    def listed(self) -> list[str]:
        """Every object of the store, by its place below the prefix."""
        listing = self._server.ask("GET", f"{self.bucket}?list-type=2").decode()
        return sorted(key.removeprefix("some/where/") for key in re.findall("<Key>([^<]*)</Key>", listing))

    def forget_copies(self) -> None:
        """Remove the copies of this machine."""
        shutil.rmtree(self.open().root / "artefacts", ignore_errors=True)

    def get(self, kind: str, key: str, name: str) -> bytes:
        return self._server.ask("GET", self.path(kind, key, name))

    def put(self, kind: str, key: str, name: str, content: bytes) -> None:
        self._server.ask("PUT", self.path(kind, key, name), content)
        self.forget_copies()

    def drop(self, kind: str, key: str, name: str) -> None:
        self._server.ask("DELETE", self.path(kind, key, name))
        self.forget_copies()


def fill(draft: Draft) -> None:
    draft.write_json("value.json", {"b": 1, "a": [1.5, None, "é"]})
    (draft.path / "deep" / "er").mkdir(parents=True)
    (draft.path / "deep" / "er" / "bytes.bin").write_bytes(bytes(range(200)))
    draft.provenance["note"] = "made in a test"


FILES = (MANIFEST, "value.json", "deep/er/bytes.bin")


def refuse(draft: Draft) -> None:
    raise AssertionError("made again")


def drafts(store: Store) -> list[Path]:
    """What lies in the drafts' folder."""
    return sorted((store.root / "drafts").glob("*"))


def child(code: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    """Start Python on `code`, with the store's names at hand; the first argument opens the store."""
    opening = "import os, sys, time, signal\nfrom pathlib import Path\nfrom bmm.store import Store\n"
    return subprocess.Popen(
        [sys.executable, "-c", opening + textwrap.dedent(code), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def answer(process: subprocess.Popen[str]) -> str:
    """Return what a child printed, once it has ended well."""
    out, problems = process.communicate(timeout=60)
    assert process.returncode == 0, problems
    return out.strip()


def until(condition: Callable[[], Any]) -> None:
    """Wait for something that another process does."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
