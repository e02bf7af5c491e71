from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from httpx2 import Request, Response
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from bmm.checkpoint import resolve as module
from bmm.checkpoint.resolve import Resolved, register_scheme, resolve
from bmm.errors import CheckpointError, UserError


@pytest.fixture(autouse=True)
def own_schemes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_schemes", {})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Stand in for the hub: records the call and answers with a snapshot or raises `hub["error"]`."""
    seen: dict[str, Any] = {}

    def download(model: str, **options: Any) -> str:
        seen.update(options, model=model)
        if "error" in seen:
            raise seen["error"]
        snapshot = tmp_path / "cache" / "snapshots" / ("c0ffee" * 6)
        snapshot.mkdir(parents=True, exist_ok=True)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return seen


@pytest.mark.parametrize("source", ["news", "./news", "org/news", "models:/news", "org/news@main"])
def test_a_local_folder_wins(tmp_path: Path, source: str, hub: dict[str, Any]) -> None:
    (tmp_path / source).mkdir(parents=True)
    assert resolve(source, tmp_path, "base_model") == Resolved((tmp_path / source).resolve(), source, None)
    assert hub == {}


def test_an_absolute_path_and_a_parent_are_folders_too(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert resolve(str(tmp_path / "a"), tmp_path / "b", "x").path == (tmp_path / "a").resolve()
    assert resolve("../a", tmp_path / "b", "x").path == (tmp_path / "a").resolve()


def test_local_folders_cost_no_import(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from bmm.checkpoint.resolve import resolve\n"
        f"resolve('.', Path({str(tmp_path)!r}), 'x')\n"
        "print(*{'torch', 'transformers', 'huggingface_hub'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize(
    ("source", "revision"), [("org/model", None), ("org/model@v1.0", "v1.0"), ("org/model@pr/1", "pr/1")]
)
def test_a_hub_id_is_fetched_and_known_by_its_commit(
    tmp_path: Path, hub: dict[str, Any], source: str, revision: str | None
) -> None:
    found = resolve(source, tmp_path, "base_model")
    assert found.revision == "c0ffee" * 6
    assert found.path.is_dir()
    assert found.source == source
    assert (hub["model"], hub["revision"]) == ("org/model", revision)
    patterns = hub["allow_patterns"]
    kept = list(
        huggingface_hub.utils.filter_repo_objects(
            [
                "model.safetensors",
                "config.json",
                "pytorch_model.bin",
                "x.py",
                "onnx/model.safetensors",
                "vocab.txt",
            ],
            allow_patterns=patterns,
            ignore_patterns=hub["ignore_patterns"],
        )
    )
    assert kept == ["model.safetensors", "config.json", "vocab.txt"]


def answered(status: int) -> Response:
    return Response(status, request=Request("GET", "https://example.org"))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RepositoryNotFoundError("gone", response=answered(404)), "no such model as 'org/model'"),
        (RevisionNotFoundError("gone", response=answered(404)), "no revision 'v9'"),
        (GatedRepoError("gated", response=answered(403)), "log in"),
        (LocalEntryNotFoundError("offline"), "could not be reached"),
        (ConnectionError("reset\nby peer"), "could not be reached"),
        (RuntimeError("anything"), "could not be reached"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left"),
    ],
)
def test_every_failure_of_the_hub_is_one_sentence(
    tmp_path: Path, hub: dict[str, Any], error: Exception, words: str
) -> None:
    hub["error"] = error
    with pytest.raises(CheckpointError) as caught:
        resolve("org/model@v9", tmp_path, "the expert news")
    message = str(caught.value)
    assert message.startswith("the expert news: ")
    assert words in message
    assert "\n" not in message
    if not isinstance(error, OSError) or error.errno is None:
        assert f"there is no folder {tmp_path / 'org/model@v9'}" in message


@pytest.mark.parametrize("source", ["news", "./org/news", "a/b/c", "/no/such", "~/no-such-folder-here", "org/"])
def test_what_can_only_be_a_path_is_never_looked_up(tmp_path: Path, hub: dict[str, Any], source: str) -> None:
    with pytest.raises(CheckpointError, match="there is no folder"):
        resolve(source, tmp_path, "base_model")
    assert hub == {}


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        resolve("m", tmp_path, "base_model")


@pytest.mark.parametrize("source", ["a\0b", "x" * 5000, "~nobody-of-this-name/x"])
def test_an_impossible_path_is_refused(tmp_path: Path, source: str) -> None:
    with pytest.raises(CheckpointError, match="base_model"):
        resolve(source, tmp_path, "base_model")


def test_a_registered_scheme_gets_the_whole_source(tmp_path: Path) -> None:
    register_scheme("Models", lambda source: Resolved(tmp_path, source, "7"))
    assert resolve("models:/news/7", tmp_path, "x") == Resolved(tmp_path, "models:/news/7", "7")
    with pytest.raises(CheckpointError, match=r"unknown scheme 's3:' \(known here: models:\)"):
        resolve("s3://bucket/news", tmp_path, "x")


def test_folders_outside_of_the_allowed_ones_are_refused_whether_they_exist_or_not(
    tmp_path: Path, hub: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    monkeypatch.setenv("BMM_ALLOWED_FOLDERS", str(tmp_path / "in"))
    for source in ("../out", "../none", str(tmp_path / "out")):
        with pytest.raises(UserError, match="lies outside"):
            resolve(source, tmp_path / "in", "x")
    with pytest.raises(UserError, match="snapshots"):
        resolve("org/model", tmp_path / "in", "x")
