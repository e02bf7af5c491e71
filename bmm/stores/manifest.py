"""The manifest of an artefact: its files with sizes and digests, what it was made from, and a seal over all of that.

Its text is written last and never changed: an artefact is what its manifest says, or damaged. Where manifests and
files lie is the stores' business.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bmm.digest import digest_each, digest_json
from bmm.errors import ArtefactDamagedError

MANIFEST = "manifest.json"
_SCHEMA = 1


def manifest_of(
    folder: Path, kind: str, key: str, describe: Mapping[str, Any], provenance: Mapping[str, Any], seconds: float
) -> dict[str, Any]:
    """Return the manifest of the files in a folder.

    Args:
        folder: holds the artefact's files.
        kind: what it is.
        key: its key.
        describe: inputs and settings, for people.
        provenance: when, where and with what it was made; not digested.
        seconds: how long that took.
    """
    names = files_of(folder)
    digests = digest_each([folder / name for name in names])
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": digest}
        for name, digest in zip(names, digests, strict=True)
    }
    manifest = {
        "schema": _SCHEMA,
        "kind": kind,
        "key": key,
        "made_from": dict(describe),
        "files": files,
        "digest": digest_json(files),
        "provenance": {"made_at": time.time(), "seconds": seconds, **provenance},
    }
    return {**manifest, "seal": _seal(manifest)}


def manifest_text(manifest: Mapping[str, Any]) -> str:
    """Return the one text that a manifest has."""
    return json.dumps(manifest, indent=1, sort_keys=True)


def parse_manifest(text: str, what: str) -> dict[str, Any]:
    """Return the manifest that a text holds.

    Args:
        text: as it was read.
        what: begins every message.

    Raises:
        ArtefactDamagedError: it is not what was written.
    """
    try:
        manifest: dict[str, Any] = json.loads(text)
        dict(manifest["files"])
        # The text as well, so that a changed digit beyond a number's precision does not pass.
        intact = manifest["seal"] == _seal(manifest) and text == manifest_text(manifest)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ArtefactDamagedError(f"{what} has an unreadable manifest") from None
    if not intact:
        raise ArtefactDamagedError(f"{what} has an altered manifest")
    return manifest


def read_manifest(folder: Path, what: str) -> dict[str, Any]:
    """Return the manifest of the artefact in a folder, in a store or outside, whose files are all there by name.

    Args:
        folder: the artefact's folder.
        what: begins every message.

    Raises:
        FileNotFoundError: there is no manifest.
        ArtefactDamagedError: it is not what was written, or a file is missing or too much.
    """
    manifest = parse_manifest((folder / MANIFEST).read_text(encoding="utf-8", errors="replace"), what)
    odd = sorted((set(files_of(folder)) - {MANIFEST}) ^ set(manifest["files"]))
    if odd:
        raise ArtefactDamagedError(f"{what} lacks, or has too much, the file {odd[0]}")
    return manifest


def unchecked(text: str) -> dict[str, Any]:
    """Return what a manifest's text says, whether or not it is what was written; nothing, if it cannot be read."""
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError, RecursionError):
        return {}


def made_at(manifest: Mapping[str, Any], fallback: float) -> float:
    """Return when an artefact was made, if its manifest says so."""
    try:
        return float(manifest["provenance"]["made_at"])
    except (ValueError, KeyError, TypeError):
        return fallback


def files_of(folder: Path) -> list[str]:
    """Return the names of the files below a folder, in order."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _seal(manifest: Mapping[str, Any]) -> str:
    return digest_json({name: value for name, value in manifest.items() if name != "seal"})
