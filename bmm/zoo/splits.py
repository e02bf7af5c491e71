"""From a text set to the rows of one task: training, calibration, validation, test, disjoint by digest.

Pure draws and JSON lines; which set and how many rows is the caller's choice.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from bmm.digest import digest_json, digest_text
from bmm.errors import DataError
from bmm.zoo.staging import make_folder
from bmm.zoo.text_sets import Row, TextSet, fold

SPLITS = ("calibration", "validation", "test")


@dataclass(frozen=True)
class SplitSizes:
    """How many rows each split gets; `test` takes as many as there are where there are fewer."""

    calibration: int = 256
    validation: int = 200
    test: int = 400


@dataclass(frozen=True)
class TaskRows:
    """Rows `(text, label)` of one task; the four lists share no text."""

    labels: tuple[str, ...]
    training: list[Row]
    calibration: list[Row]
    validation: list[Row]
    test: list[Row]

    def digest(self) -> str:
        """Return the SHA-256 of all rows in their order."""
        return digest_json([self.labels, self.training, self.calibration, self.validation, self.test])


def row_digest(text: str) -> str:
    """Return the SHA-256 of a row's folded text: two rows with the same digest are the same row."""
    return digest_text(fold(text))


def split(text_set: TextSet, sizes: SplitSizes, seed: int = 0) -> TaskRows:
    """Draw calibration rows from `train`, validation and test rows from `held_out`; the rest trains.

    The draws are seeded and independent of the order of rows; each split is ordered by its draw.

    Raises:
        DataError: the set has too few rows for the sizes asked for.
    """
    held_out = _shuffled(text_set.held_out, f"{text_set.name}/held-out/{seed}")
    held_out_digests = {row_digest(text) for text, _ in held_out}
    train = [row for row in text_set.train if row_digest(row[0]) not in held_out_digests]
    train = _shuffled(train, f"{text_set.name}/train/{seed}")
    if len(held_out) <= sizes.validation or len(train) <= sizes.calibration:
        raise DataError(
            f"the text set '{text_set.name}' has {len(train)} training and {len(held_out)} held-out rows, "
            f"too few for {sizes.calibration} calibration and {sizes.validation} validation rows; "
            "ask for fewer"
        )
    return TaskRows(
        labels=text_set.labels,
        training=train[sizes.calibration :],
        calibration=train[: sizes.calibration],
        validation=held_out[: sizes.validation],
        test=held_out[sizes.validation : sizes.validation + sizes.test],
    )


def _shuffled(rows: Iterable[Row], seed: str) -> list[Row]:
    """Return one row for each digest, shuffled; sorting first takes the incoming order out of the draw."""
    by_digest = {row_digest(text): (text, label) for text, label in rows}
    ordered = [by_digest[key] for key in sorted(by_digest)]
    # Strings seed `random` through SHA-512, the same in every process and version.
    random.Random(seed).shuffle(ordered)  # noqa: S311 - a draw of rows, not a secret
    return ordered


def json_lines(rows: Iterable[Row]) -> str:
    """Return rows as JSON lines `{"text", "label"}`, the label by its class name."""
    return "".join(json.dumps({"text": text, "label": label}, ensure_ascii=False) + "\n" for text, label in rows)


def write_splits(rows: TaskRows, folder: Path) -> Mapping[str, Path]:
    """Write calibration, validation and test rows to `folder/SPLIT.jsonl`, each file appearing whole.

    A file that already holds the same bytes is left alone.
    """
    make_folder(folder)
    paths = {}
    for name in SPLITS:
        path = folder / f"{name}.jsonl"
        write_if_changed(path, json_lines(getattr(rows, name)))
        paths[name] = path
    return paths


def write_if_changed(path: Path, text: str) -> None:
    """Write `text` in UTF-8 to a temporary neighbour and rename it, unless `path` already holds it."""
    content = text.encode("utf-8")
    if path.is_file() and path.read_bytes() == content:
        return
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
