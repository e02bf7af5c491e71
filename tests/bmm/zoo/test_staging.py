"""Temporary folders vanish, publish whole, and those of dead processes are swept."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bmm.zoo.staging import make_folder, publish, scratch


def test_nothing_is_left_unless_it_is_published(tmp_path: Path) -> None:
    def stop() -> None:
        with scratch(tmp_path / "deep", "a") as folder:
            (folder / "f").write_text("x")
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        stop()
    assert list((tmp_path / "deep").iterdir()) == []
    with scratch(tmp_path, "a") as folder:
        (folder / "f").write_text("new")
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "old").write_text("old")
        publish(folder, tmp_path / "a")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["f"]


def test_only_folders_of_the_dead_are_swept(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, sys; from bmm.zoo.staging import scratch\n"
        "with scratch(pathlib.Path(sys.argv[1]), 'a'): os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -9
    assert len(list(tmp_path.iterdir())) == 1
    living = tmp_path / f".a.{os.getppid()}.new"
    living.mkdir()
    other = tmp_path / ".b.1.new"
    other.mkdir()
    with scratch(tmp_path, "a"):
        pass
    assert sorted(tmp_path.iterdir()) == sorted([living, other])


def test_a_file_in_the_way_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    with pytest.raises(NotADirectoryError):
        make_folder(tmp_path / "a")
