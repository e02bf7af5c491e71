"""About how many calibration rows each expert has, from line ends and headers: enough for a plan.

Rows themselves are read, checked and sampled in `bmm.evaluation.data`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bmm.evaluation.tables import FOLDERS
from bmm.kinds.settings import SplitSource
from bmm.recipe import Recipe
from bmm.sources import split_files

UNKNOWN = 256
"""Taken where nobody can tell before the rows are read: a data set on a hub, say."""
_CHUNK = 1 << 20


def calibration_rows(recipe: Recipe) -> list[int]:
    """Return how many calibration rows each expert has, or at most has, where only its files know; 0 without any.

    Raises:
        UserError: a file is missing, or may not be read.
    """
    found = []
    for expert in recipe.experts:
        source = expert.splits().get("calibration")
        if source is None:
            found.append(0)
        elif source.rows is not None:
            found.append(source.rows)
        else:
            files = split_files(expert, "calibration", source, recipe.folder)
            found.append(max(_counted(source, files) - source.skip, 1))
    return found


def _counted(source: SplitSource, files: Sequence[Path]) -> int:
    if source.path in FOLDERS:
        return len(files)
    counts = [_rows_in(path) for path in files]
    known = [count for count in counts if count is not None]
    return sum(known) if known and len(known) == len(counts) else UNKNOWN + source.skip


def _rows_in(path: Path) -> int | None:
    """Return the rows of a file, or what they are at most; None where it does not show."""
    match path.suffix:
        case ".jsonl" | ".txt":
            return _lines(path)
        case ".json":
            # A whole document may hold any number of them.
            return None if _begins_with_bracket(path) else _lines(path)
        case ".csv" | ".tsv":
            return max(_lines(path) - 1, 0)
        case ".parquet":
            return _in_parquet(path)
    return None


def _lines(path: Path) -> int:
    count, last = 0, b"\n"
    with path.open("rb") as handle:
        while chunk := handle.read(_CHUNK):
            count, last = count + chunk.count(b"\n"), chunk[-1:]
    return count + (last != b"\n")


def _begins_with_bracket(path: Path) -> bool:
    with path.open("rb") as handle:
        return handle.read(_CHUNK).lstrip().startswith(b"[")


def _in_parquet(path: Path) -> int | None:
    from pyarrow import ArrowException, parquet

    try:
        return int(parquet.read_metadata(path).num_rows)
    except (ArrowException, OSError):
        # What is wrong with it is said when it is read.
        return None
