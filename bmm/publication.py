"""The output folder: the model out of the store, with its card, report and `merge.json`, put in place as a whole.

An output that holds these very weights already keeps them, and only what tells of the run is written anew.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from bmm.checkpoint.allowed import check_allowed
from bmm.checkpoint.folder import replacing
from bmm.digest import digest_file
from bmm.disk import explained
from bmm.document import SCHEMA
from bmm.errors import OutputError
from bmm.store import Artefact
from bmm.stores.manifest import MANIFEST

_LINKED_BYTES = 64 * 2**20


def export(artefact: Artefact, document: Mapping[str, Any], output: Path) -> None:
    """Write the output folder of a merge.

    Args:
        artefact: the `model` artefact.
        document: the merge's document.
        output: where the user wants it.

    Raises:
        OutputError: the folder cannot be written, or is somebody else's.
    """
    if (output / "merge.json").is_file() and holds(output, artefact):
        rewrite_report(output, document)
        return
    with replacing(output) as folder, explained(output):
        ignored = shutil.ignore_patterns(MANIFEST)
        shutil.copytree(artefact.path, folder, dirs_exist_ok=True, ignore=ignored, copy_function=_place)
        for name, text in told(document).items():
            (folder / name).write_text(text, encoding="utf-8")


def _place(source: str, target: str) -> None:
    """Copy a file, or link a large one: on one disk the store and the output need not both have its bytes.

    Who writes into such a file of the output in place damages the artefact too, which the store then finds out.
    """
    if os.path.getsize(source) >= _LINKED_BYTES:
        with suppress(OSError):
            os.link(source, target)
            return
    shutil.copy2(source, target)


def read_document(output: Path) -> dict[str, Any]:
    """Return the document of an output folder.

    Raises:
        OutputError: the folder holds no readable merge.json.
    """
    try:
        document = json.loads((output / "merge.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        document = None
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise OutputError(f"{output} holds no readable merge.json; name the output folder of a finished merge")
    return document


def rewrite_report(output: Path, document: Mapping[str, Any]) -> None:
    """Write report and card of an output folder anew from its document.

    Raises:
        OutputError: the folder cannot be written.
        UserError: it lies outside of `BMM_ALLOWED_FOLDERS`.
    """
    check_allowed(output, "the output folder")
    with explained(output):
        for name, text in told(document).items():
            _replace_file(output / name, text)


def told(document: Mapping[str, Any]) -> dict[str, str]:
    """Return what lies beside a merged model and tells of its run: texts by the names of their files."""
    # Drawing takes long to import, and most who import this module have nothing to write yet, or at all.
    from bmm.report.card import model_card
    from bmm.report.page import report_page

    return {
        "merge.json": json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        "report.html": report_page(document),
        "README.md": model_card(document),
    }


def holds(output: Path, artefact: Artefact) -> bool:
    """Say whether a folder holds the files of the `model` artefact, byte for byte."""
    return all(
        (output / name).is_file()
        and (output / name).stat().st_size == expected["bytes"]
        and digest_file(output / name) == expected["sha256"]
        for name, expected in artefact.manifest["files"].items()
    )


def _replace_file(path: Path, text: str) -> None:
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
