"""An S3-speaking server in a process of its own, and a proxy in front of it that fails as networks do."""

from __future__ import annotations

import http.client
import os
import socket
import socketserver
import struct
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

SECRET = "not-to-be-seen-anywhere"  # noqa: S105 - nobody's
KEY_ID = "key-id-not-to-be-seen-either"


class ObjectServer:
    """The server's address, and its objects without any client in between."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    def new_bucket(self) -> str:
        """Make a bucket and return its name."""
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        self.ask("PUT", name)
        return name

    def ask(self, method: str, path: str, content: bytes | None = None) -> bytes:
        """Ask for a bucket or an object (`bucket/key`) and return the body of the answer."""
        signed = f"AWS4-HMAC-SHA256 Credential={KEY_ID}/20260101/us-east-1/s3/aws4_request"
        headers = {"Authorization": signed, "Content-Type": "application/octet-stream"}
        request = urllib.request.Request(f"{self.url}/{path}", content, headers, method=method)  # noqa: S310
        with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310
            return bytes(response.read())

    def environment(self, port: int | None = None) -> dict[str, str]:
        """Return what a process needs to find the server, or what listens at another port in front of it."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port or self.port}",
            "AWS_ACCESS_KEY_ID": KEY_ID,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
        }


@contextmanager
def running_server(folder: Path) -> Iterator[ObjectServer]:
    """Run moto's server for the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with (folder / "object-server.log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, "AWS_DEFAULT_REGION": "us-east-1"}
        )
    server = ObjectServer(port)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                server.ask("PUT", "first-bucket")
                break
            except OSError:
                assert process.poll() is None, (folder / "object-server.log").read_text()
                assert time.monotonic() < deadline, (folder / "object-server.log").read_text()
                time.sleep(0.1)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


Fault = Literal["503", "403", "reset", "lost", "cut", "hold"]
"""An answer of 503 or 403; a reset before the request is passed on; one after it, without the answer; one in the middle
of the answer; no answer and no end, nothing passed on."""
Choose = Callable[[str, str], "Fault | None"]


class FaultyProxy:
    """Passes requests on to a server, but for those that `choose` (method, path) gives a fault."""

    def __init__(self, upstream: int) -> None:
        self.choose: Choose = lambda *_: None
        self.seen: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self._guard = threading.RLock()
        proxy = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                proxy._handle(self, upstream)

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def fail(self, *faults: Fault, method: str = "", path: str = "") -> None:
        """Give these faults, in order, to the next requests with this method and this piece of a path."""
        left = list(faults)

        def choose(asked: str, at: str) -> Fault | None:
            return left.pop(0) if left and asked.startswith(method) and path in at else None

        self.choose = choose

    def asked(self, method: str, path: str = "") -> int:
        """Return how often something was asked for."""
        with self._guard:
            return sum(one == method and path in at for one, at in self.seen)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handle(self, handler: Any, upstream: int) -> None:
        line = handler.rfile.readline().decode("latin-1")
        if not line:
            return
        method, path, _ = line.split(" ", 2)
        headers = http.client.parse_headers(handler.rfile)
        body = handler.rfile.read(int(headers.get("Content-Length") or 0))
        with self._guard:
            fault = self.choose(method, path)
            self.seen.append((method, path))
            if fault is not None:
                self.faults.append(fault)
        if fault == "hold":
            handler.rfile.read()
            return
        if fault in ("503", "403"):
            code = "SlowDown" if fault == "503" else "SignatureDoesNotMatch"
            said = f"<Error><Code>{code}</Code><AWSAccessKeyId>{KEY_ID}</AWSAccessKeyId></Error>"
            handler.wfile.write(
                f"HTTP/1.1 {fault} No\r\nContent-Length: {len(said)}\r\nConnection: close\r\n\r\n{said}".encode()
            )
            return
        if fault == "reset":
            _reset(handler.connection)
            return
        del headers["Connection"]
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        with socket.create_connection(("127.0.0.1", upstream), timeout=60) as onward:
            onward.sendall(f"{line}{head}Connection: close\r\n\r\n".encode("latin-1") + body)
            answer = b"".join(iter(lambda: onward.recv(1 << 16), b""))
        if fault == "cut":
            start = answer.index(b"\r\n\r\n") + 4
            handler.wfile.write(answer[: start + (len(answer) - start) // 2])
        if fault in ("cut", "lost"):
            _reset(handler.connection)
            return
        handler.wfile.write(answer)


def _reset(connection: socket.socket) -> None:
    """Close with RST, not with FIN: lingering for no time at all."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
