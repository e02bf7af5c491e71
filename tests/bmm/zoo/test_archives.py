"""Reading members of real archives."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_packages import make_wheel, tar_of, write_deb

from bmm.zoo.archives import read_debian, read_folder, read_members, read_tar
from bmm.zoo.packages import PackageError


def test_members_are_read_from_wheel_and_source_distribution(tmp_path: Path) -> None:
    package = make_wheel(tmp_path, "tinyset", {"tinyset/b.txt": b"B", "tinyset/a.txt": b"A", "other": b"C"})
    wheel = tmp_path / package.filename
    assert read_members(wheel, ["tinyset/a.txt", "other"]) == {"tinyset/a.txt": b"A", "other": b"C"}
    assert list(read_folder(wheel, "tinyset/")) == ["tinyset/a.txt", "tinyset/b.txt"]
    source = tmp_path / "tinyset.tar.gz"
    source.write_bytes(tar_of({"tinyset/a.txt": b"A"}))
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
        read_tar(tar_of({"a": b"A"}), ["b"], "outer")


def test_a_debian_package_gives_its_regular_files(tmp_path: Path) -> None:
    members = {"usr/share/a.png": b"A", "usr/share/b.txt": b"B", "usr/share/odd.png": b"odd"}
    path = write_deb(tmp_path / "tiny.deb", members, links={"./usr/share/c.png": "a.png"})
    found = read_debian(path, lambda name: name.endswith(".png"))
    assert found == {"usr/share/a.png": b"A", "usr/share/odd.png": b"odd"}


def test_a_damaged_debian_package_is_named(tmp_path: Path) -> None:
    path = write_deb(tmp_path / "tiny.deb", {"a": b"A" * 9000})
    with pytest.raises(PackageError, match="lacks a member"):
        read_debian(path, lambda name: name == "b")
    whole = path.read_bytes()
    for content in (b"", b"not ar", whole[:100], whole[:-60], whole.replace(b"data.tar", b"date.tar")):
        path.write_bytes(content)
        with pytest.raises(PackageError, match=r"tiny\.deb"):
            read_debian(path, lambda name: name == "a")
