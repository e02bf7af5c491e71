"""Fetching pinned packages into a cache folder with each registry's own client: pip, npm, apt-get.

Nothing is installed. A file that is in the cache already, byte for byte, needs no client and no network. Which
packages there are is in `bmm.zoo.packages`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path

from bmm.digest import digest_file
from bmm.disk import explained
from bmm.progress import Bar, progress
from bmm.zoo.packages import Package, PackageError
from bmm.zoo.staging import scratch

FETCH_TIMEOUT_SECONDS = 900.0
POLL_SECONDS = 0.2

_CLIENTS = {"npm": "npm", "debian": "apt-get"}


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
    for package in missing:
        # Before a minute of other downloads.
        _require_client(package, cache)
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
    _require_client(package, cache)
    with explained(cache), scratch(cache, package.name) as staging:
        arriving = _Arriving(package, staging, bar)
        {"pypi": _pip, "npm": _npm, "debian": _apt, "installed": _installed}[package.registry](package, arriving)
        fetched = arriving.files / package.filename
        if not fetched.is_file():
            raise PackageError(
                f"fetching {package.title} brought no file {package.filename}; "
                "check which packages the registry is configured to offer"
            )
        found = digest_file(fetched)
        if found != package.sha256:
            raise PackageError(
                f"{package.filename} has the SHA-256 {found}, not the pinned {package.sha256}; "
                "it is not the file this version was written for"
            )
        fetched.replace(target)
        arriving.finish()
    return target


class _Arriving:
    """A package on its way: the folders that a client works in, and how many bytes have been reported."""

    def __init__(self, package: Package, staging: Path, bar: Bar | None) -> None:
        self.package = package
        self.staging = staging
        self.files = staging / "files"
        self.scratch = staging / "scratch"
        self.files.mkdir()
        self.scratch.mkdir()
        self._bar = bar
        self._shown = 0
        self._deadline = time.monotonic() + FETCH_TIMEOUT_SECONDS

    def run(self, command: Sequence[str]) -> str | None:
        """Run a client in `files` and report the bytes that arrive; return None, or what it complained of."""
        log = self.staging / "client.log"
        environment = {**os.environ, "TMPDIR": str(self.scratch)}
        with log.open("wb") as output:
            process = subprocess.Popen(  # noqa: S603
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                cwd=self.files,
            )
            try:
                while process.poll() is None:
                    if time.monotonic() > self._deadline:
                        raise PackageError(
                            f"fetching {self.package.title} took more than "
                            f"{FETCH_TIMEOUT_SECONDS / 60:.0f} minutes; check the network and try again"
                        )
                    time.sleep(POLL_SECONDS)
                    self._report(min(_bytes_under(self.staging), self.package.size))
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        return None if process.returncode == 0 else complaint(log.read_text(encoding="utf-8", errors="replace"))

    def finish(self) -> None:
        """Report what is left of the package's size."""
        self._report(self.package.size)

    def _report(self, arrived: int) -> None:
        if self._bar is not None and arrived > self._shown:
            self._bar.advance(arrived - self._shown)
            self._shown = arrived


def _pip(package: Package, arriving: _Arriving) -> None:
    requirements = arriving.staging / "requirements.txt"
    # With the digest in the requirement pip compares it before it looks into the file: for a source
    # distribution pip asks the build backend for metadata, which must not happen with a file other than the
    # pinned one.
    requirements.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    # Naming the package keeps build requirements as wheels, where ":all:" would build them from source too.
    kind = "--only-binary=:all:" if package.is_wheel else f"--no-binary={package.name}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "-q"]
    command += ["--no-input", kind, "-r", str(requirements), "-d", str(arriving.files)]
    _require(package, arriving.run(command))


def _npm(package: Package, arriving: _Arriving) -> None:
    command = ["npm", "pack", f"{package.name}@{package.version}", "--ignore-scripts", "--silent"]
    command += ["--pack-destination", str(arriving.files), "--cache", str(arriving.scratch)]
    _require(package, arriving.run(command))


def _apt(package: Package, arriving: _Arriving) -> None:
    wanted = f"{package.name}={package.version}"
    if arriving.run(["apt-get", "-q", "download", wanted]) is None:
        return
    # The machine's lists of packages may be missing or old, and only root may renew them: own lists do as well.
    lists = arriving.scratch / "lists"
    (lists / "partial").mkdir(parents=True)
    own = ["-o", f"Dir::State::Lists={lists}", "-o", f"Dir::Cache={arriving.scratch}", "-o", "Debug::NoLocking=1"]
    _require(package, arriving.run(["apt-get", "-q", *own, "update"]))
    _require(package, arriving.run(["apt-get", "-q", *own, "download", wanted]))


def _installed(package: Package, arriving: _Arriving) -> None:
    try:
        content = files(package.name).joinpath(package.member).read_bytes()
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise PackageError(f"the Python package {package.name} lacks {package.member}; install it again") from error
    (arriving.files / package.filename).write_bytes(content)


def _require_client(package: Package, cache: Path) -> None:
    client = _CLIENTS.get(package.registry)
    if client is not None and shutil.which(client) is None:
        raise PackageError(
            f"fetching {package.title} needs {client}, which this machine does not have; install it, or put "
            f"{package.filename} (SHA-256 {package.sha256}) into {cache}"
        )


def _require(package: Package, complained: str | None) -> None:
    if complained is not None:
        raise PackageError(f"fetching {package.title} failed: {complained}")


def _bytes_under(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_size
            except FileNotFoundError:
                continue
    return total


def complaint(log: str) -> str:
    """Return the last line that a client wrote, without its level, or its meaning where it says little alone."""
    if "DO NOT MATCH THE HASHES" in log:
        return "the file on offer does not have the pinned SHA-256"
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    if not lines:
        return "the client gave no reason"
    return lines[-1].removeprefix("ERROR:").removeprefix("E:").removeprefix("npm error").strip()
