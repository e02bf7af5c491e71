"""Rows that stand for files (images, sounds): found behind a column's values, and kept as bytes, each once.

What is in the files, and how it is read, is for the kinds that use these to say.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bmm.checkpoint.allowed import check_allowed
from bmm.errors import ArtefactDamagedError, DataError
from bmm.evaluation.data import Split
from bmm.kinds.settings import PROCESSOR


def file_bytes(value: Any, noun: str, column: str, folder: Path, spot: str) -> bytes:
    """Return the bytes of the file behind one value of a column.

    Args:
        value: a file as `datasets` holds it, or a path relative to `folder`.
        noun: what the file is: "image" or "sound".
        column: its own name, for messages.
        folder: what relative paths are taken from.
        spot: begins every message: expert, split, file and row.

    Raises:
        DataError: there is none, or it cannot be read.
        UserError: it may not be read.
    """
    key = "audio" if noun == "sound" else noun
    article = "an" if noun[0] in "aeiou" else "a"
    if isinstance(value, dict) and value.get("bytes"):
        data: bytes = value["bytes"]
        return data
    path = value.get("path") if isinstance(value, dict) else value
    if path is None or path == "":
        raise DataError(f"{spot} has no {noun} in column '{column}'; remove the row")
    if isinstance(value, bytes):
        return value
    if not isinstance(path, str):
        raise DataError(
            f"{spot} has a value of type {type(value).__name__} in column '{column}' where {article} {noun} or its "
            f"path belongs; set task.{key} to the right column"
        )
    place = Path(folder).resolve() / path
    check_allowed(place, spot)
    try:
        return place.read_bytes()
    except OSError as error:
        raise DataError(f"{spot}: the {noun} {path} cannot be read: {error.strerror}; correct its path") from None


def write_files(split: Split, file: Path) -> None:
    """Write the bytes of a split's files, each once, under its row's identity."""
    held: dict[str, Tensor] = {}
    for row in split.rows:
        if row.identity not in held:
            held[row.identity] = torch.frombuffer(bytearray(row.data), dtype=torch.uint8)
    save_file(held, file)


def read_files(split: Split, file: Path, noun: str) -> Split:
    """Return a split whose rows have the bytes of their files, from what `write_files` wrote.

    Raises:
        ArtefactDamagedError: a file is missing.
    """
    try:
        held = {name: tensor.numpy().tobytes() for name, tensor in load_file(file).items()}
        return Split(split.name, tuple(replace(row, data=held[row.identity]) for row in split.rows))
    except (OSError, KeyError, SafetensorError):
        raise ArtefactDamagedError(f"the {noun}s of {split.name} are not whole; load them again") from None


@contextmanager
def processor_folder(folder: Path, said: Mapping[str, Any] | None) -> Iterator[Path]:
    """Give the folder whose file says how such files are read.

    Args:
        folder: the expert's.
        said: what the file says, where the expert has none of its own and reads as the base does.
    """
    if said is None:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="bmm-processor-") as place:
        (Path(place) / PROCESSOR).write_text(json.dumps(dict(said)), encoding="utf-8")
        yield Path(place)
