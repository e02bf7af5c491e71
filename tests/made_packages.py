"""Archives made by hand: wheels, gzipped tars, Debian packages."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

from bmm.digest import digest_file
from bmm.zoo.packages import Package


def write_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def make_wheel(folder: Path, name: str, members: dict[str, bytes]) -> Package:
    """Write a wheel that pip takes, and return it pinned."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name}-1.0.0.dist-info"
    own = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    path = write_zip(folder / f"{name}-1.0.0-py3-none-any.whl", {**own, **members})
    return Package(name, "1.0.0", path.name, digest_file(path), path.stat().st_size, "mit")


def tar_of(members: dict[str, bytes], mode: str = "w:gz", links: dict[str, str] | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    return buffer.getvalue()


def write_deb(path: Path, members: dict[str, bytes], *, control: str = "", links: dict[str, str] | None = None) -> Path:
    """Write a Debian package: an `ar` archive of a version, a control tar and a data tar, each padded to even size."""
    parts = {
        "debian-binary": b"2.0\n",
        "control.tar.gz": tar_of({"./control": control.encode()}),
        "data.tar.xz": tar_of({f"./{name}": content for name, content in members.items()}, "w:xz", links),
    }
    content = b"!<arch>\n"
    for name, part in parts.items():
        content += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(part):<10}`\n".encode() + part + b"\n" * (len(part) % 2)
        )
    path.write_bytes(content)
    return path
