"""Gram artefacts outside of a store: written for another machine, and read back there.

A published folder is the artefact as it lies in the store, manifest and all, one for each expert. It comes from
elsewhere, so nothing in it is believed: its bytes are compared with its manifest, and its Zarr metadata must be of
the plain kind that `bmm.grams.store` writes, since other codecs could run code.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bmm.checkpoint.allowed import check_allowed
from bmm.digest import digest_file, digest_json
from bmm.disk import explained
from bmm.errors import ArtefactDamagedError, OutputError, RecipeError
from bmm.store import Artefact
from bmm.stores.manifest import MANIFEST, read_manifest

KIND = "grams"
GROUP = "grams.zarr"
_CODECS = {"bytes", "crc32c"}


@dataclass(frozen=True)
class PublishedGrams:
    """One expert's Gram artefact in a folder: where it lies, and the digest of its files."""

    path: str
    digest: str

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return dict(vars(self))


def check_target(folder: Path) -> None:
    """Refuse, before matrices are made, a folder that could not take them.

    Raises:
        OutputError: it is a file, lies below one, or holds something else than Gram matrices.
        UserError: it lies outside of `BMM_ALLOWED_FOLDERS`.
    """
    check_allowed(folder, "the folder for the Gram matrices")
    place = next((one for one in (folder, *folder.absolute().parents) if one.exists()), folder)
    if place.exists() and not place.is_dir():
        raise OutputError(f"{place} is a file; name a folder that is new or empty")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise OutputError(f"{folder} holds something else already; name a folder that is new or empty")


def publish(artefact: Artefact, folder: Path) -> None:
    """Copy a `grams` artefact to a folder, which is new, empty or an earlier copy of the same artefact.

    Raises:
        OutputError: the folder holds something else, or cannot be written.
        UserError: it lies outside of `BMM_ALLOWED_FOLDERS`.
    """
    check_target(folder)
    with explained(folder):
        if folder.is_dir() and any(folder.iterdir()):
            if _holds(folder, artefact):
                return
            raise OutputError(f"{folder} holds something else already; name a folder that is new or empty")
        draft = folder.with_name(f".{folder.name}.bmm-new")
        shutil.rmtree(draft, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copytree(artefact.path, draft)
            draft.replace(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def find(folder: Path, where: str) -> PublishedGrams:
    """Return what lies in a published folder, going by its manifest; no matrix is read.

    Raises:
        RecipeError: it is missing, holds no Gram artefact, or has an altered manifest; the message begins with
            `where`.
        UserError: it lies outside of `BMM_ALLOWED_FOLDERS`.
    """
    check_allowed(folder, where)
    if not folder.is_dir():
        raise RecipeError(f"{where}: there is no folder {folder}; name one that `bmm grams RECIPE --output` wrote")
    try:
        manifest = read_manifest(folder, f"{where}: {folder}")
    except (FileNotFoundError, NotADirectoryError):
        raise RecipeError(
            f"{where}: {folder} holds no {MANIFEST}; name a folder that `bmm grams RECIPE --output` wrote"
        ) from None
    except ArtefactDamagedError as error:
        raise RecipeError(f"{error}; publish it again with `bmm grams RECIPE --output`") from None
    if manifest.get("kind") != KIND:
        raise RecipeError(f"{where}: {folder} holds an artefact of kind '{manifest.get('kind')}', not Gram matrices")
    if manifest.get("digest") != digest_json(manifest["files"]):
        raise RecipeError(f"{where}: {folder} has an altered manifest; publish it again")
    return PublishedGrams(str(folder), manifest["digest"])


def copy(published: PublishedGrams, target: Path, where: str) -> None:
    """Copy the matrices of a published folder to `target / "grams.zarr"`, every byte checked.

    Raises:
        RecipeError: they have changed since `find`, are damaged, or are not plain matrices; begins with `where`.
    """
    folder = Path(published.path)
    if find(folder, where).digest != published.digest:
        raise RecipeError(f"{where}: {folder} has been replaced while it was in use; start again")
    for name, expected in sorted(read_manifest(folder, where)["files"].items()):
        source, copied = folder / name, target / name
        check_allowed(source, where)
        if not name.startswith(f"{GROUP}/"):
            raise RecipeError(f"{where}: {folder} holds the file {name}, which is no part of Gram matrices; remove it")
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, copied)
        if copied.stat().st_size != expected["bytes"] or digest_file(copied) != expected["sha256"]:
            raise RecipeError(f"{where}: {source} is damaged; copy the folder again, or publish it again")
        if not _is_plain(copied, inside=name.removeprefix(f"{GROUP}/")):
            raise RecipeError(f"{where}: {source} is not what `bmm grams` writes; publish the matrices with it")


def _is_plain(path: Path, inside: str) -> bool:
    """Say whether a file is a chunk of numbers, or metadata of a kind that we write ourselves."""
    parts = inside.split("/")
    if parts[-1] != "zarr.json":
        return len(parts) == 4 and parts[1] == "c"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if value["zarr_format"] != 3 or value.get("storage_transformers") or value.get("consolidated_metadata"):
            return False
        if len(parts) == 1:
            return bool(value["node_type"] == "group")
        codecs = {codec["name"] for codec in value["codecs"]}
        height, width = value["shape"]
        rows = value["attributes"]["rows"]
        array = value["node_type"] == "array" and value["data_type"] == "float64" and codecs <= _CODECS
        return array and height == width and isinstance(rows, int) and rows >= 0
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def _holds(folder: Path, artefact: Artefact) -> bool:
    try:
        return bool(read_manifest(folder, str(folder))["digest"] == artefact.reference.digest)
    except (FileNotFoundError, NotADirectoryError, ArtefactDamagedError):
        return False
