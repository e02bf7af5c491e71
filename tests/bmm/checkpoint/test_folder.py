from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from bmm.checkpoint.folder import check_writable, output_error, replacing
from bmm.errors import OutputError, UserError


def write(folder: Path, text: str) -> None:
    (folder / "heads").mkdir()
    (folder / "heads" / "a").write_text(text)
    (folder / "merge.json").write_text(text)


def read(folder: Path) -> tuple[str, str]:
    return (folder / "merge.json").read_text(), (folder / "heads" / "a").read_text()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_new_folder_appears_whole_with_its_parents(tmp_path: Path) -> None:
    target = tmp_path / "x" / "y" / "out"
    with replacing(target) as folder:
        assert folder.parent == target.parent
        assert not target.exists()
        write(folder, "new")
    assert read(target) == ("new", "new")
    assert names(target.parent) == ["out"]


@pytest.mark.parametrize("before", ["empty", "earlier"])
def test_an_empty_and_an_earlier_folder_are_replaced(tmp_path: Path, before: str) -> None:
    target = tmp_path / "out"
    target.mkdir()
    if before == "earlier":
        write(target, "old")
        (target / "stale").write_text("")
    with replacing(target) as folder:
        write(folder, "new")
        if before == "earlier":
            assert read(target) == ("old", "old")
    assert read(target) == ("new", "new")
    assert names(target) == ["heads", "merge.json"]
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), FileNotFoundError(errno.ENOENT, "x", "/else")])
def test_a_block_that_fails_leaves_what_was_there(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "out"
    with replacing(target) as folder:
        write(folder, "old")
    with pytest.raises(type(error)) as caught, replacing(target) as folder:  # noqa: PT012
        write(folder, "new")
        raise error
    assert caught.value is error
    assert read(target) == ("old", "old")
    assert names(tmp_path) == ["out"]
    with pytest.raises(type(error)), replacing(tmp_path / "deep" / "er" / "out"):
        raise error
    assert names(tmp_path) == ["out"]


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with replacing(tmp_path / "link") as folder:
        write(folder, "new")
    assert (tmp_path / "link").is_symlink()
    assert read(tmp_path / "real") == ("new", "new")


@pytest.mark.parametrize("call", ["check", "replace"])
def test_what_is_not_ours_is_refused_and_left_alone(tmp_path: Path, call: str) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("dear")
    (tmp_path / "file").write_text("")
    for target, words in (
        (tmp_path / "thesis", "not a folder this project wrote"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "below", "cannot be written"),
        (Path("/"), "mount point"),
        (Path("/proc/bmm-out"), "cannot be written"),
        (tmp_path / ("x" * 300), "cannot be written"),
    ):
        with pytest.raises(OutputError, match=words) as caught:
            check_writable(target) if call == "check" else replacing(target).__enter__()
        assert str(target) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["file", "thesis"]
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "dear"


def test_checking_leaves_nothing_behind(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    check_writable(tmp_path)
    assert names(tmp_path) == []


def test_outside_of_the_allowed_folders_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BMM_ALLOWED_FOLDERS", str(tmp_path / "in"))
    with pytest.raises(UserError, match="the output folder"):
        check_writable(tmp_path / "out")
    with pytest.raises(UserError, match="the output folder"), replacing(tmp_path / "out"):
        pytest.fail("the block must not run")
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EDQUOT, "disk is full"),
        (errno.EFBIG, "larger than allowed"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission denied"),
        (errno.EIO, os.strerror(errno.EIO)),
    ],
)
def test_each_failure_of_the_disk_has_its_sentence(tmp_path: Path, code: int, words: str) -> None:
    assert words in str(output_error(OSError(code, os.strerror(code)), tmp_path))


def test_a_disk_that_fills_up_in_the_block_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="disk is full"), replacing(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    elsewhere = PermissionError(errno.EACCES, "Permission denied", "/some/expert")
    with pytest.raises(PermissionError) as caught, replacing(tmp_path / "out"):
        raise elsewhere
    assert caught.value is elsewhere
    assert names(tmp_path) == []


UNPRIVILEGED = """
import os, sys
from pathlib import Path
from bmm.checkpoint.folder import check_writable, replacing
from bmm.errors import OutputError
if os.getuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
for use in (check_writable, lambda target: replacing(target).__enter__()):
    try:
        use(Path(sys.argv[1]))
    except OutputError as error:
        print(error)
"""


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that any user can reach: pytest's own is closed to others."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_without_permission_it_is_one_sentence(public_folder: Path) -> None:
    closed = public_folder / "closed"
    closed.mkdir()
    closed.chmod(0o555)
    done = subprocess.run(
        [sys.executable, "-c", UNPRIVILEGED, str(closed / "out")], capture_output=True, text=True, check=True
    )
    assert (
        done.stdout.splitlines()
        == [f"{closed / 'out'} cannot be written: permission denied; change its rights or name another folder"] * 2
    )


CRASH = """
import os, shutil, signal, sys
from pathlib import Path
from bmm.checkpoint import folder as module

point, target = sys.argv[1], Path(sys.argv[2])

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def half(path, *_, **__):
    if Path(path).name.endswith("bmm-old"):
        (Path(path) / "merge.json").unlink()
        die()

original = module._sync
synced = []

def sync(path):
    original(path)
    if path == target.parent:
        synced.append(path)
        if point == ("first rename", "second rename")[len(synced) - 1]:
            die()

module._sync = sync
if point == "renaming":
    module._swap = die
if point == "removing":
    module.shutil.rmtree = half
with module.replacing(target) as folder:
    (folder / "heads").mkdir()
    (folder / "heads" / "a").write_text("killed")
    if point == "block":
        die()
    (folder / "merge.json").write_text("killed")
"""


@pytest.mark.parametrize("point", ["block", "renaming", "first rename", "second rename", "removing"])
def test_a_kill_at_any_point_loses_nothing(tmp_path: Path, point: str) -> None:
    target = tmp_path / "out"
    with replacing(target) as folder:
        write(folder, "old")
    killed = subprocess.run([sys.executable, "-c", CRASH, point, str(target)], check=False)
    assert killed.returncode == -signal.SIGKILL
    after = "killed" if point in ("second rename", "removing") else "old"
    assert target.exists() == (point != "first rename")
    assert len(names(tmp_path)) > 1
    # An attempt that fails by itself has put everything in order all the same.
    with pytest.raises(ValueError, match="again"), replacing(target) as folder:  # noqa: PT012
        assert names(folder) == []
        raise ValueError("again")
    assert read(target) == (after, after)
    assert names(tmp_path) == ["out"]
    with replacing(target) as folder:
        write(folder, "new")
    assert read(target) == ("new", "new")
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("point", ["block", "renaming"])
def test_a_kill_before_anything_was_there_leaves_no_folder(tmp_path: Path, point: str) -> None:
    target = tmp_path / "out"
    subprocess.run([sys.executable, "-c", CRASH, point, str(target)], check=False)
    assert not target.exists()
    with replacing(target) as folder:
        write(folder, "new")
    assert names(tmp_path) == ["out"]


def test_a_folder_made_in_the_place_of_one_set_aside(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with replacing(target) as folder:
        write(folder, "old")
    subprocess.run([sys.executable, "-c", CRASH, "first rename", str(target)], check=False)
    target.mkdir()
    with pytest.raises(ValueError, match="again"), replacing(target):
        raise ValueError("again")
    assert read(target) == ("old", "old")

    subprocess.run([sys.executable, "-c", CRASH, "first rename", str(target)], check=False)
    target.mkdir()
    (target / "note").write_text("somebody's")
    with pytest.raises(OutputError, match="not a folder this project wrote"), replacing(target):
        pytest.fail("the block must not run")
    assert names(target) == ["note"]
    assert read(tmp_path / ".out.bmm-old") == ("old", "old")


LIVE = """
import sys
from pathlib import Path
from bmm.checkpoint.folder import replacing
with replacing(Path(sys.argv[1])) as folder:
    (folder / "heads").mkdir()
    (folder / "heads" / "a").write_text("live")
    print("ready", flush=True)
    sys.stdin.readline()
    (folder / "merge.json").write_text("live")
"""


def test_a_live_attempt_is_never_disturbed(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-c", LIVE, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as live:
        assert live.stdin is not None
        assert live.stdout is not None
        assert live.stdout.readline() == "ready\n"
        before = names(tmp_path)
        with pytest.raises(OutputError, match="another run is writing"), replacing(target):
            pytest.fail("the block must not run")
        assert names(tmp_path) == before
        live.communicate("go\n")
    assert live.returncode == 0
    assert read(target) == ("live", "live")
    assert names(tmp_path) == ["out"]


def test_a_rename_that_fails_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    with replacing(target) as folder:
        write(folder, "old")
    original = Path.rename

    def rename(self: Path, other: Path) -> Path:
        if self.name.endswith("bmm-new"):
            raise OSError(errno.EIO, "Input/output error")
        return original(self, other)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OutputError, match="Input/output error"), replacing(target) as folder:
        write(folder, "new")
    assert read(target) == ("old", "old")
    assert names(tmp_path) == ["out"]
