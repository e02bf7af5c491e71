from __future__ import annotations

import os
from pathlib import Path

import pytest

from bmm.checkpoint.allowed import VARIABLE, check_allowed
from bmm.errors import UserError


@pytest.mark.parametrize("setting", [None, ""])
def test_without_a_limit_everything_is_allowed(setting: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    if setting is not None:
        monkeypatch.setenv(VARIABLE, setting)
    check_allowed(Path("/anywhere/at/all"), "the model")


def test_only_the_listed_folders_and_what_is_in_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, os.pathsep.join([str(tmp_path / "a"), str(tmp_path / "b")]))
    for inside in ("a", "a/deep/down", "b/x"):
        check_allowed(tmp_path / inside, "the model")
    for outside in ("c", "ab", "a/../c"):
        with pytest.raises(UserError, match=r"the output folder: .*lies outside") as caught:
            check_allowed(tmp_path / outside, "the output folder")
        assert str(tmp_path / outside) in str(caught.value)


def test_links_are_followed_on_both_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "secret").mkdir()
    (tmp_path / "alias").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "leak").symlink_to(tmp_path / "secret")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "alias"))
    check_allowed(tmp_path / "real" / "x", "the model")
    with pytest.raises(UserError, match="leak"):
        check_allowed(tmp_path / "real" / "leak", "the model")
    with pytest.raises(UserError, match="lies outside"):
        check_allowed(tmp_path / "real" / "leak" / ".." / "other", "the model")


def test_only_separators_allow_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, os.pathsep)
    with pytest.raises(UserError, match="lies outside"):
        check_allowed(tmp_path, "the model")
