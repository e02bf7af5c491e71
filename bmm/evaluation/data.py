"""Rows and splits of text classification tasks: reading them, keeping them, keeping them apart.

Lives here: `Row`, `Split`, reading a split, the files behind a split, disjointness.
Does not live here: how `datasets` is asked for a table (`bmm.evaluation.tables`), matching labels to classes
(`bmm.evaluation.labels`), tokens and models (`bmm.evaluation.model`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path

import numpy as np

from bmm.digest import canonical_json, digest_text
from bmm.errors import ArtefactDamagedError, DataError
from bmm.evaluation.labels import label_ids
from bmm.evaluation.tables import BUILDERS, data_files, opened, saved_folder, shown
from bmm.recipe import SplitSource, TextClassification

_EXCERPT = 60


@dataclass(frozen=True)
class Row:
    """One example: a text or a pair of texts, and its class id."""

    text: str
    text_pair: str | None
    label: int


@dataclass(frozen=True)
class Split:
    """Rows in a fixed order, under the name that messages call them by."""

    name: str
    rows: tuple[Row, ...]

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def row_digests(self) -> tuple[str, ...]:
        """SHA-256 of each row's texts, white space folded, label excluded: what makes two rows the same."""
        return tuple(digest_text(canonical_json([_folded(row.text), _folded(row.text_pair)])) for row in self.rows)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the ordered rows with their labels, exactly as they are."""
        return digest_text(self.to_jsonl())

    def labels(self) -> list[int]:
        """Return the class id of every row, (rows,)."""
        return [row.label for row in self.rows]

    def to_jsonl(self) -> str:
        """Return one JSON object a line, in ASCII, so that no reader's idea of a line end can cut a text."""
        return "".join(
            json.dumps({"text": row.text, "text_pair": row.text_pair, "label": row.label}) + "\n" for row in self.rows
        )

    @classmethod
    def from_jsonl(cls, name: str, text: str) -> Split:
        """Read what `to_jsonl` wrote.

        Raises:
            ArtefactDamagedError: a line is not a row.
        """
        rows = []
        for number, line in enumerate(text.removesuffix("\n").split("\n") if text else [], 1):
            try:
                value = json.loads(line)
                row = Row(text=value["text"], text_pair=value["text_pair"], label=value["label"])
            except (ValueError, KeyError, TypeError):
                raise ArtefactDamagedError(f"the rows of {name}: line {number} is not a row; load them again") from None
            rows.append(row)
        return cls(name=name, rows=tuple(rows))


def load_split(source: SplitSource, task: TextClassification, labels: Sequence[str], folder: Path, where: str) -> Split:
    """Read one split of one expert's task.

    Args:
        source: what to read; `rows` takes a seeded sample without replacement, kept in file order.
        task: names of the text, pair and label columns.
        labels: the expert's class names; the index is the id.
        folder: what relative paths are taken from.
        where: expert and split; begins every message and names the split.

    Raises:
        DataError: missing files, an unreadable or empty split, a missing column, too few rows, an empty text,
            a label that the expert's classes do not have.
    """
    spot = f"{where} ({shown(source)})"
    with opened(source, folder, spot) as table:
        total = len(table)
        if total == 0:
            raise DataError(f"{spot}: the split has no rows; name a file or split that has some")
        wanted = {"text": task.text, "text_pair": task.text_pair, "label": task.label}
        columns = {key: name for key, name in wanted.items() if name is not None}
        for key, name in columns.items():
            if name not in table.column_names:
                raise DataError(
                    f"{spot}: there is no column '{name}' (there are: {', '.join(table.column_names)}); "
                    f"set task.{key} to the right one"
                )
        chosen = _sample(total, source, spot)
        numbers = [index + 1 for index in chosen]
        picked = table.select(chosen)
        # Copied out before the cache that the table is mapped from is removed.
        texts = list(picked[columns["text"]])
        pairs = list(picked[columns["text_pair"]]) if "text_pair" in columns else None
        values = list(picked[columns["label"]])
        feature = getattr(table.features[columns["label"]], "names", None)
    ids = label_ids(values, labels, spot, numbers=numbers, feature=feature)
    _check_texts(texts, numbers, columns["text"], spot)
    if pairs is not None:
        _check_texts(pairs, numbers, columns["text_pair"], spot)
    rows = zip(texts, pairs if pairs is not None else [None] * len(texts), ids, strict=True)
    return Split(name=where, rows=tuple(Row(text, pair, label) for text, pair, label in rows))


def source_files(source: SplitSource, folder: Path, where: str = "the recipe") -> list[Path]:
    """Return the local files behind a source, absolute and in a fixed order; none for a data set on a hub.

    Raises:
        DataError: a named file or folder does not exist, or the source names none.
    """
    if source.path in BUILDERS:
        return data_files(source, folder, f"{where} ({shown(source)})")
    local = saved_folder(source, folder, f"{where} ({shown(source)})")
    return sorted(path for path in local.rglob("*") if path.is_file()) if local is not None else []


def check_disjoint(where: str, splits: Mapping[str, Split]) -> None:
    """Refuse splits of one task that share a row, whatever its label and white space.

    A row that occurs twice within one split is allowed.

    Raises:
        DataError: names the two splits, the number of distinct rows they share, and the start of the first.
    """
    for (first_name, first), (second_name, second) in combinations(splits.items(), 2):
        shared = set(first.row_digests) & set(second.row_digests)
        if shared:
            row = next(row for row, key in zip(first.rows, first.row_digests, strict=True) if key in shared)
            folded = _folded(row.text) or ""
            excerpt = folded if len(folded) <= _EXCERPT else folded[:_EXCERPT] + "…"
            count = f"{len(shared)} row{'' if len(shared) == 1 else 's'}"
            raise DataError(
                f"{where}: the splits {first_name} and {second_name} share {count}, "
                f'the first of them "{excerpt}"; remove them from one of the two'
            )


def _folded(text: str | None) -> str | None:
    return None if text is None else " ".join(text.split())


def _sample(total: int, source: SplitSource, spot: str) -> list[int]:
    """Return the indices of the rows to take, ascending."""
    if source.rows is None:
        return list(range(total))
    if source.rows > total:
        raise DataError(f"{spot}: {source.rows} rows are asked for, but there are {total}; lower `rows`")
    chosen = np.random.default_rng(source.seed).choice(total, size=source.rows, replace=False)
    return sorted(int(index) for index in chosen)


def _check_texts(texts: Sequence[object], numbers: Sequence[int], column: str, spot: str) -> None:
    for number, text in zip(numbers, texts, strict=True):
        if text is None or (isinstance(text, str) and not text.strip()):
            raise DataError(f"{spot}: row {number} has no text in column '{column}'; remove the row")
        if not isinstance(text, str):
            raise DataError(
                f"{spot}: row {number} has a value of type {type(text).__name__} in column '{column}' where "
                "text belongs; name a text column"
            )
