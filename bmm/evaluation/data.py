"""Rows and splits: what all kinds of rows have in common, keeping them, keeping them apart.

Lives here: `Split`, reading the columns of a split, the files behind a split, disjointness. Does not live here: what
a row is (`bmm.kinds`), how `datasets` is asked for a table (`bmm.evaluation.tables`), matching labels to classes
(`bmm.evaluation.labels`), models (`bmm.evaluation.model`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from bmm.checkpoint.allowed import check_allowed
from bmm.digest import digest_text
from bmm.errors import ArtefactDamagedError, DataError
from bmm.evaluation.tables import BUILDERS, data_files, encoded_files, named_files, opened, saved_folder, shown
from bmm.kinds.settings import SplitSource

_EXCERPT = 60


class Row(Protocol):
    """One example of any kind."""

    @property
    def identity(self) -> str:
        """SHA-256 of what makes two rows the same, the label excluded."""

    @property
    def excerpt(self) -> str:
        """What a message shows of the row."""

    def document(self) -> dict[str, Any]:
        """Return the row as plain JSON values that know it exactly, by digest where it is large."""


@dataclass(frozen=True)
class Split:
    """Rows in a fixed order, under the name that messages call them by; all are of one kind."""

    name: str
    rows: tuple[Any, ...]

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def row_digests(self) -> tuple[str, ...]:
        """Each row's identity."""
        return tuple(row.identity for row in self.rows)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the ordered rows with their labels, exactly as they are."""
        return digest_text(self.to_jsonl())

    def to_jsonl(self) -> str:
        """Return one JSON object a line, in ASCII, so that no reader's idea of a line end can cut a text."""
        return "".join(json.dumps(row.document()) + "\n" for row in self.rows)

    @classmethod
    def from_jsonl(cls, name: str, text: str, row: Callable[[dict[str, Any]], Row]) -> Split:
        """Read what `to_jsonl` wrote; `row` makes a row of what its `document` returned.

        Raises:
            ArtefactDamagedError: a line is not a row.
        """
        rows = []
        for number, line in enumerate(text.removesuffix("\n").split("\n") if text else [], 1):
            try:
                rows.append(row(json.loads(line)))
            except (ValueError, KeyError, TypeError):
                raise ArtefactDamagedError(f"the rows of {name}: line {number} is not a row; load them again") from None
        return cls(name=name, rows=tuple(rows))


@dataclass(frozen=True)
class Columns:
    """The columns of the rows that a split takes, copied out of the table.

    Attributes:
        spot: begins every message: expert, split and file.
        numbers: (rows,) each row's number in its file, from 1.
        values: (rows,) for each column that was asked for, by the recipe's key.
        features: what `datasets` says of each column.
        names: each column's own name.
    """

    spot: str
    numbers: tuple[int, ...]
    values: Mapping[str, list[Any]]
    features: Mapping[str, Any]
    names: Mapping[str, str]


def read_columns(source: SplitSource, wanted: Mapping[str, str | None], folder: Path, where: str) -> Columns:
    """Read some columns of one split of one expert's task.

    Args:
        source: what to read; `rows` takes a seeded sample without replacement after `skip` rows, kept in file order.
        wanted: the recipe's key and name of each column; None is passed over.
        folder: what relative paths are taken from.
        where: expert and split; begins every message.

    Raises:
        DataError: missing files, an unreadable or empty split, a missing column, too few rows.
    """
    spot = f"{where} ({shown(source)})"
    with opened(source, folder, spot) as table:
        total = len(table)
        if total == 0:
            raise DataError(f"{spot}: the split has no rows; name a file or split that has some")
        names = {key: name for key, name in wanted.items() if name is not None}
        for key, name in names.items():
            if name not in table.column_names:
                raise DataError(
                    f"{spot}: there is no column '{name}' (there are: {', '.join(table.column_names)}); "
                    f"set task.{key} to the right one"
                )
        features = {key: table.features[name] for key, name in names.items()}
        chosen = _sample(total, source, spot)
        picked = encoded_files(table.select(chosen), names.values())
        # Copied out before the cache that the table is mapped from is removed.
        values = {key: list(picked[name]) for key, name in names.items()}
    return Columns(spot, tuple(index + 1 for index in chosen), values, features, names)


def read_documents(source: SplitSource, folder: Path, where: str) -> tuple[str, tuple[int, ...], list[dict[str, Any]]]:
    """Read the rows of one split whole, with every column that the file has.

    Args:
        source: what to read; `rows` and `skip` as for `read_columns`.
        folder: what relative paths are taken from.
        where: expert and split; begins every message.

    Returns:
        what begins messages; (rows,) each row's number in its file, from 1; and the rows, JSON values by column.

    Raises:
        DataError: missing files, an unreadable or empty split, too few rows, or a value that JSON does not have.
    """
    spot = f"{where} ({shown(source)})"
    with opened(source, folder, spot) as table:
        if len(table) == 0:
            raise DataError(f"{spot}: the split has no rows; name a file or split that has some")
        chosen = _sample(len(table), source, spot)
        rows = [dict(row) for row in table.select(chosen)]
    for index, row in zip(chosen, rows, strict=True):
        try:
            json.dumps(row)
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{spot}: row {index + 1} has a value that is none of JSON: {error}; write it as text"
            ) from None
    return spot, tuple(index + 1 for index in chosen), rows


def source_files(source: SplitSource, folder: Path, where: str = "the recipe", named: str | None = None) -> list[Path]:
    """Return the local files behind a source, absolute and in a fixed order; none for a data set on a hub.

    Args:
        source: what will be read.
        folder: what relative paths are taken from.
        where: expert and split; begins every message.
        named: a column that may hold paths of images or sounds, which are behind the source too.

    Raises:
        DataError: a named file or folder does not exist, or the source names none.
        UserError: one that must be opened lies outside of `BMM_ALLOWED_FOLDERS`.
    """
    spot = f"{where} ({shown(source)})"
    if source.path in BUILDERS:
        files = data_files(source, folder, spot)
    else:
        local = saved_folder(source, folder, spot)
        files = sorted(path for path in local.rglob("*") if path.is_file()) if local is not None else []
    if named is None or not files:
        return files
    for path in files:
        # Before they are opened to see which files they name.
        check_allowed(path, spot)
    return [*files, *named_files(source, named, folder, spot)]


def check_disjoint(where: str, splits: Mapping[str, Split]) -> None:
    """Refuse splits of one task that share a row, whatever its label.

    A row that occurs twice within one split is allowed.

    Raises:
        DataError: names the two splits, the number of distinct rows they share, and the start of the first.
    """
    for (first_name, first), (second_name, second) in combinations(splits.items(), 2):
        shared = set(first.row_digests) & set(second.row_digests)
        if shared:
            row = next(row for row, key in zip(first.rows, first.row_digests, strict=True) if key in shared)
            excerpt = row.excerpt if len(row.excerpt) <= _EXCERPT else row.excerpt[:_EXCERPT] + "…"
            count = f"{len(shared)} row{'' if len(shared) == 1 else 's'}"
            raise DataError(
                f"{where}: the splits {first_name} and {second_name} share {count}, "
                f'the first of them "{excerpt}"; remove them from one of the two'
            )


def _sample(total: int, source: SplitSource, spot: str) -> list[int]:
    """Return the indices of the rows to take, ascending."""
    wanted = source.skip + (source.rows or 1)
    if wanted > total:
        after = f" after {source.skip} skipped rows" if source.skip else ""
        raise DataError(
            f"{spot}: {source.rows or 'more'} rows{after} are asked for, but there are {total}; lower "
            f"{'`rows` or `skip`' if source.skip else '`rows`'}"
        )
    if source.rows is None and not source.skip:
        return list(range(total))
    # One order for a seed, whatever is taken of it, so that splits with different parts of it share no row.
    order = np.random.default_rng(source.seed).permutation(total)
    return sorted(int(index) for index in order[source.skip :][: source.rows])
