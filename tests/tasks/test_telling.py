"""Telling people how a night ended, against a real server on loopback."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from bmm.report.night import headline, night_markdown
from tasks.telling import VARIABLE, tell_people

ROW = {
    "task": "news",
    "rows": 60,
    "new": 0.75,
    "champion": 0.7,
    "low": 0.01,
    "high": 0.09,
    "difference": 0.05,
    "floor": 0.5,
    "note": "",
}
PROMOTED = {
    "outcome": "promoted",
    "model": "mine",
    "version": "3",
    "champion": "3",
    "previous": "2",
    "reasons": [],
    "left_out": {"mail": "it has a NaN"},
    "gate": {
        "rows": [ROW, {**ROW, "task": "new", **dict.fromkeys(("champion", "low", "high", "difference", "floor"))}]
    },
    "output": "/models/mine",
    "report": "/models/mine-candidate/report.html",
    "mlflow": {"run_id": "abc", "uri": "http://mlflow", "experiment": "e"},
}
REJECTED = {**PROMOTED, "outcome": "rejected", "champion": "2", "reasons": ["news is below its floor"]}
UNCHANGED = {
    "outcome": "unchanged",
    "model": "mine",
    "champion": "2",
    "left_out": {},
    "reasons": [],
    "output": "/models/mine",
}
FAILED = {"outcome": "failed", "model": "mine", "recipe": "mine/recipe.yaml", "reasons": ["the disk is full"]}


class Hook:
    """A web hook: what was posted to it, by path; `answer` is what it says."""

    def __init__(self) -> None:
        self.posted: list[tuple[str, dict[str, Any]]] = []
        self.answer = 200
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                hook.posted.append((self.path, json.loads(body)))
                self.send_response(hook.answer)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def hook() -> Iterator[Hook]:
    found = Hook()
    yield found
    found.close()


@pytest.mark.parametrize(
    ("found", "kind", "said"),
    [
        (PROMOTED, "success", "mine: version 3 is the new champion, before it version 2"),
        (REJECTED, "warning", "mine: version 3 did not become the champion, version 2 stays"),
        (UNCHANGED, "info", "mine: nothing has changed; version 2 stays the champion"),
        (FAILED, "failure", "mine: the night failed"),
    ],
)
def test_everybody_is_told_with_the_table(
    hook: Hook, found: dict[str, Any], kind: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, f"json://127.0.0.1:{hook.port}/one\n json://127.0.0.1:{hook.port}/two")
    assert tell_people(found) is None
    assert [path for path, _ in hook.posted] == ["/one", "/two"]
    for _, message in hook.posted:
        assert (message["title"], message["type"]) == (said, kind)
        for reason in found["reasons"]:
            assert reason in message["message"]
        if "gate" in found:
            assert "| news | 60 | 70.0 | 75.0 | +5.0 | +1.0 to +9.0 | 50.0 |" in message["message"]
            assert "it has a NaN" in message["message"]


def test_who_cannot_be_told_fails_nothing_and_shows_no_address(
    hook: Hook, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    hook.answer = 500
    secret = f"json://ann:secret@127.0.0.1:{hook.port}/token-of-mine"
    monkeypatch.setenv(VARIABLE, f"nosuch://secret@host {secret} json://127.0.0.1:9/token-of-mine")
    problem = tell_people(PROMOTED)
    assert problem == (
        f"{VARIABLE}: address 1 is none that apprise knows, address 2 could not be told, address 3 could not be told"
    )
    said = capfd.readouterr()
    for text in (caplog.text, said.out, said.err):
        assert "secret" not in text
        assert "token-of-mine" not in text


def test_nobody_is_told_where_nobody_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert tell_people(PROMOTED) is None


def test_a_night_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    text = night_markdown(PROMOTED)
    assert text.startswith(f"**{headline(PROMOTED)}**")
    assert "| new | 60 |  | 75.0 |  |  |" in text
    assert "- mail: it has a NaN" in text
    assert "`/models/mine`" in text
    assert "run abc at http://mlflow" in text
    first = {**PROMOTED, "champion": None, "outcome": "rejected"}
    assert "there is none yet" in headline(first)
    assert "/models" not in night_markdown({**FAILED, "output": "/models/mine"})
