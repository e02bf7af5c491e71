"""What the fault tests share: the `bmm` command in this process or a real one, and what a command may leave behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from answers import TOLD, Answer

from bmm.digest import digest_file
from bmm.store import Store
from bmm.stores.manifest import MANIFEST

Bmm = Callable[..., Answer]


@pytest.fixture
def bmm() -> Bmm:
    """Run the command line in this process: words in, `Answer` out. An exception that is not an exit code escapes."""

    def call(*words: str | Path) -> Answer:
        from typer.testing import CliRunner

        from flows.cli import app

        result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
        return Answer(result.exit_code, result.stdout, result.stderr)

    return call


@pytest.fixture
def real_bmm(environment: dict[str, str]) -> Bmm:
    """Run the installed `bmm` script as a process of its own."""

    def call(*words: str | Path, **more: Any) -> Answer:
        done = subprocess.run(command(*words), env=environment, capture_output=True, text=True, timeout=240, **more)
        return Answer(done.returncode, done.stdout, done.stderr)

    return call


@pytest.fixture
def environment() -> dict[str, str]:
    """The environment of real commands: this one, with one thread a process."""
    return one_thread()


def one_thread() -> dict[str, str]:
    """Return this process's environment for a command whose processes shall have one thread each."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def command(*words: str | Path) -> list[str]:
    """Return the command line of the installed `bmm` script."""
    return [str(Path(sys.executable).with_name("bmm")), *(str(word) for word in words)]


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is where temporary files go, of this process and of its children."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


@pytest.fixture(scope="session")
def scheduler() -> Iterator[str]:
    """The address of a warm Dask cluster inside this process, for tests that need Grams but not their workers."""
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=1,
        threads_per_worker=1,
        processes=False,
        protocol="tcp",
        host="127.0.0.1",
        dashboard_address="127.0.0.1:0",
    ) as cluster:
        yield str(cluster.scheduler_address)


@pytest.fixture(scope="session")
def small_source(pico_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pico folder with a shorter search, fewer comparisons and no tracker; copy it, don't change it."""
    folder = tmp_path_factory.mktemp("small") / "pico"
    shutil.copytree(pico_source, folder)
    change(
        folder,
        lambda recipe: recipe.update(
            search={"per": "model", "trials": 6},
            evaluation={"bootstrap_samples": 100, "compare": ["average", "regmean"]},
            tracking={"enabled": False},
        ),
    )
    return folder


@pytest.fixture
def small(small_source: Path, tmp_path: Path) -> Path:
    """A copy of the small pico folder that a test may change."""
    folder = tmp_path / "small"
    shutil.copytree(small_source, folder)
    return folder


@pytest.fixture(scope="session")
def finished(small_source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder and the store of an uninterrupted merge of it by a real command with workers of its own."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(small_source, folder / "pico")
    words = command("merge", folder / "pico" / "recipe.yaml", "--no-server", "--store", folder / "store", "--json")
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, env=one_thread())
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(Answer(0, done.stdout, done.stderr).states().values()) == {"ran"}
    return folder / "pico", folder / "store"


def change(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    """Edit a folder's recipe in place and return its path."""
    path = folder / "recipe.yaml"
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    edit(recipe)
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def tree(folder: Path) -> dict[str, str]:
    """Return everything under a folder, hidden things included: files by digest, folders and links by kind."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            what = f"link to {os.readlink(path)}"
        else:
            what = digest_file(path) if path.is_file() else "folder"
        found[path.relative_to(folder).as_posix()] = what
    return found


def model_files(output: Path) -> dict[str, str]:
    """Return the digests of the files that are the model."""
    return {name: digest for name, digest in tree(output).items() if name not in TOLD}


def assert_no_halves(store: Path) -> None:
    """Assert that a store holds whole artefacts and nothing else: no draft, no progress, no half-written folder."""
    for name in ("drafts", "progress"):
        left = list((store / name).glob("*")) if (store / name).exists() else []
        assert left == [], f"{name} of the store is not empty"
    assert Store.open(store).verify() == []
    for folder in (store / "artefacts").glob("*/*"):
        assert (folder / MANIFEST).is_file(), f"{folder} has no manifest"


def records(store: Path, kind: str) -> dict[str, tuple[int, int]]:
    """Return the artefacts of one kind by key, with inode and time of their folders, which change when remade."""
    found: Mapping[str, Path] = {path.name: path for path in (store / "artefacts" / kind).glob("*")}
    return {key: (path.stat().st_ino, path.stat().st_mtime_ns) for key, path in found.items()}


def remove_artefacts(store: Path, *kinds: str) -> None:
    """Remove all artefacts of these kinds, as if they had never been made."""
    for kind in kinds:
        shutil.rmtree(store / "artefacts" / kind, ignore_errors=True)
