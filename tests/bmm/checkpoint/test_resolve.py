from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer

from bmm.checkpoint import resolve as module
from bmm.checkpoint.resolve import Resolved, register_scheme, resolve
from bmm.errors import CheckpointError, UserError


@pytest.fixture(autouse=True)
def own_schemes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_schemes", {})


@pytest.mark.parametrize("source", ["news", "./news", "org/news", "models:/news", "org/news@main"])
def test_a_local_folder_wins(tmp_path: Path, source: str, hub: HubServer) -> None:
    (tmp_path / source).mkdir(parents=True)
    assert resolve(source, tmp_path, "base_model") == Resolved((tmp_path / source).resolve(), source, None)
    assert hub.asked == []


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


@pytest.mark.parametrize("source", ["news", "./org/news", "a/b/c", "/no/such", "~/no-such-folder-here", "org/"])
def test_what_can_only_be_a_path_is_never_looked_up(tmp_path: Path, hub: HubServer, source: str) -> None:
    with pytest.raises(CheckpointError, match="there is no folder"):
        resolve(source, tmp_path, "base_model")
    assert hub.asked == []


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
    tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    monkeypatch.setenv("BMM_ALLOWED_FOLDERS", str(tmp_path / "in"))
    for source in ("../out", "../none", str(tmp_path / "out")):
        with pytest.raises(UserError, match="lies outside"):
            resolve(source, tmp_path / "in", "x")
    (tmp_path / "model").mkdir()
    hub.push("org/model", tmp_path / "model")
    with pytest.raises(UserError, match="snapshots"):
        resolve("org/model", tmp_path / "in", "x")
