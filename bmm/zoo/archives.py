"""Reading members of the archives that `bmm.zoo.fetching` brings: wheels, tars, Debian packages.

Everything is read into memory; nothing is unpacked to the disk, installed or imported.
"""

from __future__ import annotations

import io
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bmm.zoo.packages import PackageError

_AR_MAGIC = b"!<arch>\n"
_AR_HEADER = 60


def read_members(archive: Path, names: Iterable[str]) -> dict[str, bytes]:
    """Return the bytes of the named members of a wheel or a source distribution.

    Raises:
        PackageError: the archive is damaged or lacks one of the members.
    """
    if archive.suffix != ".whl":
        with _reading(str(archive)):
            content = archive.read_bytes()
        return read_tar(content, names, str(archive))
    with _reading(str(archive)), zipfile.ZipFile(archive) as opened:
        return {name: opened.read(name) for name in names}


def read_folder(archive: Path, prefix: str) -> dict[str, bytes]:
    """Return the bytes of every file of a wheel whose name begins with `prefix`, by name, in sorted order.

    Raises:
        PackageError: the archive is damaged, or no file begins with `prefix`.
    """
    with _reading(str(archive)), zipfile.ZipFile(archive) as opened:
        names = sorted(name for name in opened.namelist() if name.startswith(prefix) and not name.endswith("/"))
        if not names:
            raise KeyError(prefix)
        return {name: opened.read(name) for name in names}


def read_tar(content: bytes, names: Iterable[str], where: str) -> dict[str, bytes]:
    """Return the bytes of the named members of a gzipped tar held in memory; `where` names it in errors.

    Raises:
        PackageError: the archive is damaged or lacks one of the members.
    """
    members: dict[str, bytes] = {}
    with _reading(where), tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as opened:
        for name in names:
            handle = opened.extractfile(name)
            if handle is None:
                raise KeyError(name)
            members[name] = handle.read()
    return members


def read_debian(archive: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """Return the bytes of the regular files of a Debian package whose name (`usr/share/…`) is wanted, by name.

    Links are left out: what they point to has a name of its own.

    Raises:
        PackageError: the archive is damaged, or no file is wanted.
    """
    members: dict[str, bytes] = {}
    with _reading(str(archive)), archive.open("rb") as handle:
        content = _debian_data(handle.read())
        with tarfile.open(fileobj=io.BytesIO(content), mode="r|*") as opened:
            for member in opened:
                name = member.name.removeprefix("./")
                if member.isreg() and wanted(name):
                    found = opened.extractfile(member)
                    members[name] = found.read() if found is not None else b""
        if not members:
            raise KeyError("the files of its data set")
    return members


def _debian_data(content: bytes) -> bytes:
    """Return the (compressed) tar of installed files inside a Debian package, an `ar` archive (`deb(5)`)."""
    if not content.startswith(_AR_MAGIC):
        raise tarfile.ReadError("not a Debian package")
    position = len(_AR_MAGIC)
    while position + _AR_HEADER <= len(content):
        header = content[position : position + _AR_HEADER]
        name, size = header[:16].decode("ascii", errors="replace").strip().rstrip("/"), int(header[48:58])
        position += _AR_HEADER
        if name.startswith("data.tar"):
            return content[position : position + size]
        position += size + size % 2
    raise KeyError("data.tar")


@contextmanager
def _reading(where: str) -> Iterator[None]:
    try:
        yield
    except KeyError as error:
        what = str(error.args[0]) if error.args else "the wanted member"
        raise PackageError(f"{where} lacks a member ({what}); delete the file and run again") from None
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError) as error:
        raise PackageError(f"{where} cannot be read: {error}; delete the file and run again") from None
