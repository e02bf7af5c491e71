from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from bmm.disk import explained, free_bytes, sync
from bmm.errors import CheckpointError, OutputError


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk is full"),
        (errno.EFBIG, "the disk is full"),
        (errno.EACCES, "permission denied"),
        (errno.EPERM, "permission denied"),
        (errno.EROFS, "read-only"),
        (errno.ENOTDIR, "a part of the path is a file"),
    ],
)
def test_a_refusal_is_one_sentence_that_names_the_place(code: int, said: str) -> None:
    with (
        pytest.raises(OutputError, match=f"/some/where cannot be written: .*{said}") as caught,
        explained(Path("/some/where")),
    ):
        raise OSError(code, os.strerror(code))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["I/O error: No space left on device (os error 28)", "File too large (os error 27)"])
def test_a_full_disk_is_seen_through_what_libraries_make_of_it(text: str) -> None:
    with pytest.raises(OutputError, match="the disk is full"), explained(Path("x")):
        raise RuntimeError(text)
    wrapped = RuntimeError("could not save")
    wrapped.__cause__ = OSError(errno.ENOSPC, text)
    with pytest.raises(OutputError, match="the disk is full"), explained(Path("x")):
        raise wrapped


def test_other_errors_pass_unchanged() -> None:
    with pytest.raises(FileNotFoundError), explained(Path("x")):
        raise FileNotFoundError(errno.ENOENT, "no such file")
    with pytest.raises(ZeroDivisionError), explained(Path("x")):
        _ = 1 / 0


def test_a_users_mistake_keeps_its_own_sentence() -> None:
    mistake = CheckpointError("the model is locked")
    mistake.__context__ = PermissionError(errno.EACCES, "denied")
    with pytest.raises(CheckpointError, match="model is locked"), explained(Path("x")):
        raise mistake


def test_free_space_is_that_of_the_nearest_folder_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def usage(path: Path) -> shutil._ntuple_diskusage:
        asked.append(path)
        return shutil._ntuple_diskusage(10, 3, 7)

    monkeypatch.setattr("bmm.disk.shutil.disk_usage", usage)
    assert free_bytes(tmp_path / "not" / "there" / "yet") == 7
    assert asked == [tmp_path]


def test_files_and_folders_can_be_synced(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    sync(tmp_path / "file")
    sync(tmp_path)
    with pytest.raises(FileNotFoundError):
        sync(tmp_path / "none")
