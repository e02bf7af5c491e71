"""A model hub on loopback: the part of the Hugging Face hub's protocol that fetching a model needs.

What a branch is at now (`/api/models/…/revision/…`), the files of a commit (`/tree/`, in pages), and each file
(`/resolve/`): small ones at once, weights by a redirect to an address of another origin, as the hub sends them to where
large files lie. What the hub has beside (Xet's chunks, searches, uploads) is not here.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

_PAGE = 3
_API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(/(?P<what>revision|tree)/(?P<revision>[^/]+))?")
_FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
_LARGE = re.compile(r"/large/(?P<digest>[0-9a-f]{64})")
_MESSAGES = {
    "RepoNotFound": "Repository not found",
    "RevisionNotFound": "Invalid rev id",
    "EntryNotFound": "Entry not found",
    "GatedRepo": "Access to the model is restricted",
}


@dataclass
class Repository:
    """Commits with their files, and the branches that name them."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False


class HubServer:
    """The hub's address, what it holds, and what it was asked.

    `meanwhile` is called once, when the next question what a branch is at has its answer. `status` is answered to
    everything, if it is set. A `token` is what everybody has to show who shows one.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.asked: list[str] = []
        self.meanwhile: Callable[[], object] | None = None
        self.status: int | None = None
        self.token: str | None = None
        self._large: dict[str, bytes] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def push(self, repository: str, folder: Path, branch: str = "main") -> str:
        """Put a folder's files on a branch as they are now, and return the commit."""
        files = {one.relative_to(folder).as_posix(): one.read_bytes() for one in folder.rglob("*") if one.is_file()}
        known = self.repositories.setdefault(repository, Repository())
        told = json.dumps([len(known.commits), *sorted((path, _oid(content)) for path, content in files.items())])
        commit = hashlib.sha1(told.encode(), usedforsecurity=False).hexdigest()
        self._large |= {hashlib.sha256(one).hexdigest(): one for one in files.values()}
        known.commits[commit] = files
        known.branches[branch] = commit
        return commit

    def count(self, piece: str) -> int:
        """Return how often something with this piece of a path was asked for."""
        return sum(piece in one for one in self.asked)

    def environment(self, home: Path) -> dict[str, str]:
        """Return what makes a process ask this hub, and keep what it fetches in a folder."""
        return {"HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home)}

    def asked_here(self, patch: pytest.MonkeyPatch, home: Path) -> None:
        """Make this process, which has read its environment long ago, do the same."""
        from huggingface_hub import constants

        patch.setattr(constants, "ENDPOINT", self.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", self.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))

    def close(self) -> None:
        """Go away: nobody listens at the address any more."""
        self._server.shutdown()
        self._server.server_close()

    def large(self, digest: str) -> bytes | None:
        """Return a large file by its digest."""
        return self._large.get(digest)


@contextmanager
def running_hub() -> Iterator[HubServer]:
    """Run a hub for the block."""
    server = HubServer()
    try:
        yield server
    finally:
        server.close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: HubServer, *arguments: Any) -> None:
        self._hub = hub
        super().__init__(*arguments)

    def log_message(self, *_: Any) -> None:
        """Say nothing: `HubServer.asked` is what tests read."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        address = urlsplit(self.path)
        self._hub.asked.append(f"{self.command} {address.path}")
        if self._hub.status is not None:
            self._send(self._hub.status, b"{}")
        elif found := _LARGE.fullmatch(address.path):
            content = self._hub.large(found["digest"])
            self._send(404 if content is None else 200, content or b"")
        elif not self._is_known():
            self._send(401, b"{}", {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif found := _API.fullmatch(address.path):
            self._api(found["repo"], found["what"], unquote(found["revision"] or "main"), address.query)
        elif found := _FILE.fullmatch(address.path):
            self._file(found["repo"], unquote(found["revision"]), unquote(found["path"]))
        else:
            self._send(404, b"{}")

    def _is_known(self) -> bool:
        shown = self.headers.get("Authorization")
        return shown is None or self._hub.token is None or shown == f"Bearer {self._hub.token}"

    def _find(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Return a commit and its files; answer what the hub answers where there is none."""
        known = self._hub.repositories.get(name)
        if known is None:
            # So that nobody learns which private models there are.
            self._refuse(404 if self.headers.get("Authorization") else 401, "RepoNotFound")
            return None
        commit = known.branches.get(revision, revision)
        if commit not in known.commits:
            self._refuse(404, "RevisionNotFound")
            return None
        return commit, known.commits[commit]

    def _api(self, name: str, what: str | None, revision: str, query: str) -> None:
        found = self._find(name, revision)
        if found is None:
            return
        commit, files = found
        if what != "tree":
            if self._hub.meanwhile is not None:
                then, self._hub.meanwhile = self._hub.meanwhile, None
                then()
            siblings = [{"rfilename": path} for path in sorted(files)]
            self._json({"_id": commit[:24], "id": name, "modelId": name, "sha": commit, "siblings": siblings})
            return
        start = int(re.sub(r".*cursor=(\d+).*", r"\1", query)) if "cursor=" in query else 0
        page = [_entry(path, files[path]) for path in sorted(files)][start : start + _PAGE]
        more = start + _PAGE < len(files)
        address = f"{self._hub.url}{urlsplit(self.path).path}?recursive=True&cursor={start + _PAGE}"
        self._json(page, {"Link": f'<{address}>; rel="next"'} if more else {})

    def _file(self, name: str, revision: str, path: str) -> None:
        found = self._find(name, revision)
        if found is None:
            return
        commit, files = found
        headers = {"X-Repo-Commit": commit}
        if self._hub.repositories[name].gated:
            self._refuse(403, "GatedRepo", headers)
        elif path not in files:
            self._refuse(404, "EntryNotFound", headers)
        elif _is_large(path):
            digest = hashlib.sha256(files[path]).hexdigest()
            headers |= {
                "X-Linked-ETag": f'"{digest}"',
                "X-Linked-Size": str(len(files[path])),
                "Location": f"http://localhost:{self._hub.port}/large/{digest}",
            }
            self._send(302, b"", headers)
        else:
            self._send(200, files[path], {**headers, "ETag": f'"{_oid(files[path])}"'})

    def _refuse(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self._json({"error": _MESSAGES[code]}, {**(headers or {}), "X-Error-Code": code}, status)

    def _json(self, value: Any, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        # A connection that stays open would go on answering when nobody listens any more.
        for name, value in {**(headers or {}), "Content-Length": str(len(content)), "Connection": "close"}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _is_large(path: str) -> bool:
    return path.endswith(".safetensors")


def _oid(content: bytes) -> str:
    """Return the name that git gives to a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _entry(path: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": _oid(content)}
    if _is_large(path):
        digest = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 132}
    return entry
