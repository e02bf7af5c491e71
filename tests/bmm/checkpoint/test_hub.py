"""Models fetched over the hub's own protocol, from a hub on loopback."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub
import pytest
from hub_server import HubServer

from bmm.checkpoint.resolve import resolve
from bmm.errors import CheckpointError, ModelAwayError

FILES = {
    "model.safetensors": "weights",
    "config.json": "{}",
    "tokenizer.json": "[]",
    "vocab.txt": "a b",
    "README.md": "# A model",
}
UNWANTED = ("pytorch_model.bin", "modeling.py", "onnx/model.safetensors")


@pytest.fixture
def pushed(tmp_path: Path, hub: HubServer) -> Path:
    """A folder that is pushed to org/model."""
    folder = tmp_path / "pushed"
    for name in (*FILES, *UNWANTED):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(FILES.get(name, "unwanted"))
    hub.push("org/model", folder)
    return folder


def fetched(source: str, tmp_path: Path) -> tuple[str | None, dict[str, str]]:
    found = resolve(source, tmp_path, "the expert news")
    assert found.source == source
    files = [one for one in found.path.rglob("*") if one.is_file()]
    return found.revision, {one.relative_to(found.path).as_posix(): one.read_text() for one in files}


def refusal(source: str, tmp_path: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        resolve(source, tmp_path, "the expert news")
    message = str(caught.value)
    assert message.startswith("the expert news: ")
    assert "\n" not in message
    return caught.value


def test_a_model_is_fetched_without_what_is_of_no_use_and_known_by_its_commit(
    tmp_path: Path, hub: HubServer, pushed: Path
) -> None:
    commit = hub.repositories["org/model"].branches["main"]
    hub.repositories["org/model"].branches["refs/pr/1"] = commit
    for source in ("org/model", "org/model@main", "org/model@refs/pr/1", f"org/model@{commit}"):
        assert fetched(source, tmp_path) == (commit, FILES)
    # The files came once: the weights from where the hub has large files, the others from itself.
    assert (hub.count("GET /large/"), hub.count("GET /org/model/resolve/")) == (1, len(FILES) - 1)


def test_a_branch_is_looked_up_every_time_and_a_commit_never_again(
    tmp_path: Path, hub: HubServer, pushed: Path
) -> None:
    first, _ = fetched("org/model@main", tmp_path)
    (pushed / "model.safetensors").write_text("better")
    second = hub.push("org/model", pushed)
    assert fetched("org/model@main", tmp_path) == (second, FILES | {"model.safetensors": "better"})
    hub.asked.clear()
    assert fetched(f"org/model@{first}", tmp_path) == (first, FILES)
    assert hub.asked == []


def test_a_branch_that_moves_while_it_is_fetched_is_what_it_was_at_first(
    tmp_path: Path, hub: HubServer, pushed: Path
) -> None:
    def move() -> None:
        (pushed / "model.safetensors").write_text("better")
        hub.push("org/model", pushed)

    first, hub.meanwhile = hub.repositories["org/model"].branches["main"], move
    assert fetched("org/model", tmp_path) == (first, FILES)
    assert fetched("org/model", tmp_path)[0] != first


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("org/other", "the hub has no such model as 'org/other'"),
        ("org/model@dev", "the hub has no revision 'dev' of 'org/model'"),
        (f"org/model@{'0' * 40}", f"no revision '{'0' * 40}'"),
        ("org/gated", "only to those it has let in; log in"),
        ("org/a--b", "no such model"),
    ],
)
def test_what_the_hub_does_not_have_is_one_sentence(
    tmp_path: Path, hub: HubServer, pushed: Path, source: str, words: str
) -> None:
    hub.push("org/gated", pushed)
    hub.repositories["org/gated"].gated = True
    refused = refusal(source, tmp_path)
    assert words in str(refused)
    assert f"there is no folder {tmp_path / source}" in str(refused)
    assert not isinstance(refused, ModelAwayError)


def test_a_hub_that_does_not_answer_is_not_taken_for_one_without_news(
    tmp_path: Path, hub: HubServer, pushed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, _ = fetched("org/model@main", tmp_path)
    hub.status = 503
    for reason in (huggingface_hub.errors.HfHubHTTPError, httpx2.ConnectError):
        away = refusal("org/model@main", tmp_path)
        assert isinstance(away, ModelAwayError)
        assert isinstance(away.__cause__, reason)
        assert "could not be reached for 'org/model'" in str(away)
        hub.close()
    assert fetched(f"org/model@{commit}", tmp_path) == (commit, FILES)
    # Unless that is asked for.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert fetched("org/model@main", tmp_path) == (commit, FILES)
    away = refusal("org/model@dev", tmp_path)
    assert isinstance(away, ModelAwayError)
    assert "HF_HUB_OFFLINE is set" in str(away)


def test_a_model_that_was_withdrawn_is_not_taken_from_what_was_fetched(
    tmp_path: Path, hub: HubServer, pushed: Path
) -> None:
    fetched("org/model", tmp_path)
    del hub.repositories["org/model"]
    assert "no such model as 'org/model'" in str(refusal("org/model", tmp_path))


def test_a_login_that_is_refused_is_named_and_not_shown(
    tmp_path: Path, hub: HubServer, pushed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = "hf_good"  # noqa: S105 - nobody's
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    refused = refusal("org/model", tmp_path)
    assert isinstance(refused, ModelAwayError)
    assert "refuses this login for 'org/model' (401)" in str(refused)
    assert "secret" not in str(refused)
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    assert fetched("org/model", tmp_path)[1] == FILES


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left"),
        (RuntimeError("a\nb"), "could not be reached"),
    ],
)
def test_whatever_else_goes_wrong_is_one_sentence(
    tmp_path: Path, hub: HubServer, pushed: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert words in str(refusal("org/model", tmp_path))
