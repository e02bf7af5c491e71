"""From whatever a label column holds to class ids of one expert.

Lives here: the rules by which integers, booleans, strings and class features are matched to the expert's
class names. Does not live here: reading files (`bmm.evaluation.data`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from bmm.errors import DataError
from bmm.evaluation.data import Columns

_GENERIC = re.compile(r"(?:label_)?(\d+)", re.IGNORECASE)
_SHOWN_CLASSES = 8


NO_LABEL = -1
"""The class id of a row whose label is not read."""


def class_ids(columns: Columns, labels: Sequence[str], *, labelled: bool, in_order: bool = False) -> list[int]:
    """Return the class id of every row of a table whose labels are in the column `label`; see `label_ids`.

    Args:
        columns: of the split.
        labels: the expert's class names.
        labelled: whether the rows' labels were read; else each is `NO_LABEL`.
        in_order: as of `label_ids`.

    Raises:
        DataError: as `label_ids` raises it.
    """
    if not labelled:
        return [NO_LABEL] * len(columns.numbers)
    return label_ids(
        columns.values["label"],
        labels,
        columns.spot,
        numbers=columns.numbers,
        feature=getattr(columns.features["label"], "names", None),
        in_order=in_order,
    )


def label_ids(
    values: Sequence[object],
    labels: Sequence[str],
    where: str,
    *,
    numbers: Sequence[int] | None = None,
    feature: Sequence[str] | None = None,
    in_order: bool = False,
) -> list[int]:
    """Return the class id of every value of a label column.

    Integers are ids. Strings are class names: exactly, else ignoring case where that leaves one class, else,
    where the expert's classes are only numbered (`LABEL_0`, `0`), by their number. Booleans are the names
    true and false where the expert has them, else 0 and 1. A column with its own class names (`feature`) is
    matched by name, because its ids may be in another order than the expert's; only where either side is
    merely numbered do its ids count.

    Args:
        values: (rows,) the column.
        labels: the expert's class names; the index is the id.
        where: begins every message: expert, split and file.
        numbers: (rows,) row numbers for messages, counted from 1; defaults to 1, 2, ….
        feature: the column's own class names, where it has them (`datasets.ClassLabel`).
        in_order: `labels` are other words for the column's classes, in the same order: where the names do not match,
            the column's ids count, if there are as many.

    Raises:
        DataError: a row without a label, or with one that the expert's classes do not have.
    """
    numbers = range(1, len(values) + 1) if numbers is None else numbers
    if feature is not None:
        values = _unfold(values, feature, labels, in_order=in_order)
    find = _finder(labels)
    numbered_otherwise = _numbered_otherwise(labels)
    ids = []
    for number, value in zip(numbers, values, strict=True):
        match value:
            case None:
                raise DataError(f"{where}: row {number} has no label; remove the row or label it")
            case bool():
                found = find(str(value))
                index = int(value) if found is None else found
            case int() if numbered_otherwise:
                raise DataError(
                    f"{where}: row {number} has the label {value}, which could be a class id or a class "
                    f"name, because the expert's classes are {_shown(labels)}; write the class names as "
                    "strings"
                )
            case int():
                index = value
            case str():
                found = find(value)
                if found is None:
                    raise DataError(
                        f"{where}: row {number} has the label '{value}', which is none of the expert's "
                        f"classes ({_shown(labels)}); correct the row, the label column or the expert's "
                        "id2label"
                    )
                index = found
            case _:
                raise DataError(
                    f"{where}: row {number} has the label {value!r} of type {type(value).__name__}; "
                    f"use class ids or class names"
                )
        if not 0 <= index < len(labels):
            raise DataError(
                f"{where}: row {number} has the class id {index}, but the expert has {len(labels)} classes "
                f"(0 to {len(labels) - 1}); correct the row or the label column"
            )
        ids.append(index)
    return ids


def _unfold(values: Sequence[object], feature: Sequence[str], labels: Sequence[str], *, in_order: bool) -> list[object]:
    """Turn the ids of a class feature into class names, or leave them ids where names would say nothing."""
    # datasets marks an unlabelled row of a class feature with -1.
    ids = [value if isinstance(value, int) and value >= 0 else None for value in values]
    find = _finder(labels)
    # What other words stand for is told by all classes, not by those that happen to occur in the rows.
    named = feature if in_order else [feature[value] for value in ids if value is not None]
    matched = all(find(name) is not None for name in named)
    same_order = in_order and len(feature) == len(labels)
    if not matched and (same_order or only_numbered(labels) or only_numbered(feature)):
        return list(ids)
    return [None if value is None else feature[value] for value in ids]


def _finder(labels: Sequence[str]) -> Callable[[str], int | None]:
    """Return a function from a class name to its id, or None."""
    exact = {label: index for index, label in enumerate(labels)}
    folded: dict[str, list[int]] = {}
    for index, label in enumerate(labels):
        folded.setdefault(label.strip().casefold(), []).append(index)
    by_number = {}
    if only_numbered(labels):
        by_number = {int(label.casefold().removeprefix("label_")): index for index, label in enumerate(labels)}

    def find(name: str) -> int | None:
        if name in exact:
            return exact[name]
        candidates = folded.get(name.strip().casefold(), [])
        if len(candidates) == 1:
            return candidates[0]
        number = re.fullmatch(r"[0-9]+", name.strip())
        return by_number.get(int(number[0])) if number else None

    return find


def only_numbered(names: Sequence[str]) -> bool:
    """Say whether class names are but their numbers (`LABEL_0`, `0`)."""
    return bool(names) and all(_GENERIC.fullmatch(name) for name in names)


def _numbered_otherwise(labels: Sequence[str]) -> bool:
    """Whether the class names are plain numbers that differ from the class ids (stars 1 to 5, say)."""
    plain = all(re.fullmatch(r"[0-9]+", label) for label in labels)
    return plain and any(int(label) != index for index, label in enumerate(labels))


def _shown(labels: Sequence[str]) -> str:
    more = f", … {len(labels)} in all" if len(labels) > _SHOWN_CLASSES else ""
    return ", ".join(labels[:_SHOWN_CLASSES]) + more
