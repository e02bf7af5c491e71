"""From a labelled set to the rows of one task: training, calibration, validation, test, disjoint by digest.

Pure draws and the files they become; which set and how many rows is the caller's choice.
"""

from __future__ import annotations

import io
import json
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bmm.digest import digest_json
from bmm.errors import DataError
from bmm.zoo.pictures import Picture
from bmm.zoo.sets import LabelledSet, Row, content_digest
from bmm.zoo.staging import make_folder

SPLITS = ("calibration", "validation", "test")


@dataclass(frozen=True)
class SplitSizes:
    """How many rows each split gets: `test` at most as many as are left, `calibration` at most half of `train`."""

    calibration: int = 256
    validation: int = 200
    test: int = 400


@dataclass(frozen=True)
class TaskRows:
    """Rows `(content, label)` of one task; the four lists share no content."""

    labels: tuple[str, ...]
    training: list[Row]
    calibration: list[Row]
    validation: list[Row]
    test: list[Row]

    def digest(self) -> str:
        """Return the SHA-256 of all rows in their order; a picture counts by its pixels."""
        lists = (self.training, self.calibration, self.validation, self.test)
        return digest_json([self.labels, *([[_named(content), label] for content, label in rows] for rows in lists)])


def _named(content: str | Picture) -> str:
    return content.digest if isinstance(content, Picture) else content


def split(labelled: LabelledSet, sizes: SplitSizes, seed: int = 0) -> TaskRows:
    """Draw calibration rows from `train`, validation and test rows from `held_out`; the rest trains.

    The draws are seeded and independent of the order of rows; each split is ordered by its draw.

    Raises:
        DataError: the set has too few rows for the sizes asked for.
    """
    held_out = _shuffled(labelled.held_out, f"{labelled.name}/held-out/{seed}")
    held_out_digests = {content_digest(content) for content, _ in held_out}
    train = [row for row in labelled.train if content_digest(row[0]) not in held_out_digests]
    train = _shuffled(train, f"{labelled.name}/train/{seed}")
    calibration = min(sizes.calibration, len(train) // 2)
    if len(held_out) <= sizes.validation or not calibration:
        raise DataError(
            f"the set '{labelled.name}' has {len(train)} training and {len(held_out)} held-out rows, "
            f"too few for {sizes.calibration} calibration and {sizes.validation} validation rows; "
            "ask for fewer"
        )
    return TaskRows(
        labels=labelled.labels,
        training=train[calibration:],
        calibration=train[:calibration],
        validation=held_out[: sizes.validation],
        test=held_out[sizes.validation : sizes.validation + sizes.test],
    )


def _shuffled(rows: Iterable[Row], seed: str) -> list[Row]:
    """Return one row for each digest, shuffled; sorting first takes the incoming order out of the draw."""
    by_digest = {content_digest(content): (content, label) for content, label in rows}
    ordered = [by_digest[key] for key in sorted(by_digest)]
    # Strings seed `random` through SHA-512, the same in every process and version.
    random.Random(seed).shuffle(ordered)  # noqa: S311 - a draw of rows, not a secret
    return ordered


def json_lines(rows: Iterable[Row]) -> str:
    """Return rows as JSON lines `{"text", "label"}`, the label by its class name."""
    return "".join(json.dumps({"text": text, "label": label}, ensure_ascii=False) + "\n" for text, label in rows)


def parquet(rows: Sequence[Row]) -> bytes:
    """Return rows as a Parquet file with the columns `image` (PNG, read as a picture by `datasets`) and `label`."""
    import pyarrow
    from datasets import Features, Image, Value
    from pyarrow.parquet import write_table

    columns = {
        "image": [{"bytes": content.png(), "path": None} for content, _ in rows if isinstance(content, Picture)],
        "label": [label for _, label in rows],
    }
    # The schema carries the features, so that the reader knows the bytes for images.
    schema = Features({"image": Image(), "label": Value("string")}).arrow_schema
    buffer = io.BytesIO()
    write_table(pyarrow.table(columns, schema=schema), buffer)
    return buffer.getvalue()


def write_splits(rows: TaskRows, folder: Path) -> Mapping[str, Path]:
    """Write calibration, validation and test rows to `folder`, each file appearing whole.

    Texts become `SPLIT.jsonl`, pictures `SPLIT.parquet`. A file that already holds the same bytes is left alone.
    """
    make_folder(folder)
    paths = {}
    for name in SPLITS:
        chosen = getattr(rows, name)
        pictures = bool(chosen) and isinstance(chosen[0][0], Picture)
        path = folder / (f"{name}.parquet" if pictures else f"{name}.jsonl")
        write_if_changed(path, parquet(chosen) if pictures else json_lines(chosen).encode("utf-8"))
        paths[name] = path
    return paths


def write_if_changed(path: Path, content: bytes) -> None:
    """Write `content` to a temporary neighbour and rename it, unless `path` already holds it."""
    if path.is_file() and path.read_bytes() == content:
        return
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
