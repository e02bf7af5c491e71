"""Labelled sets of texts or pictures in one shape: cleaned, without repeats, some rows held out.

What a row is and what makes two rows the same lives here; reading sets from archives is in `bmm.zoo.text_sets` and
`bmm.zoo.image_sets`, cutting them into a task's splits in `bmm.zoo.splits`.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from bmm.digest import digest_text
from bmm.zoo.packages import Package
from bmm.zoo.pictures import Picture

Content = str | Picture
Row = tuple[Content, str]

HELD_OUT_SHARE = 0.4
SPLIT_SEED = 0

# Control and invisible formatting characters, lone surrogates, and the mark that undecodable bytes leave.
_NOISE = re.compile(
    "[\\x00-\\x1f\\x7f-\\x9f\\u200b-\\u200f\\u2028-\\u202e\\u2060-\\u2064\\ufeff\\ufffd\\ud800-\\udfff]+"
)


@dataclass(frozen=True)
class LabelledSet:
    """Rows `(content, label)` of one set; `labels` are its class names, sorted; no content occurs twice."""

    name: str
    labels: tuple[str, ...]
    train: list[Row]
    held_out: list[Row]


@dataclass(frozen=True)
class Source:
    """Where a set comes from: its package, a line for people, and the reader of the archive.

    `read` returns the training rows and the set's own test rows, or None where it has no such part.
    """

    package: Package
    title: str
    read: Callable[[Path], tuple[list[Row], list[Row] | None]]

    def labelled_set(self, name: str, archive: Path) -> LabelledSet:
        """Return the set read from `archive` and cleaned.

        Raises:
            PackageError: the archive is damaged or lacks the set's files.
        """
        train, held_out = self.read(archive)
        return assemble(name, train, held_out)


def fold(text: str) -> str:
    """Return `text` without control and undecodable characters, runs of white space folded to one space."""
    return " ".join(_NOISE.sub(" ", text).split())


def content_digest(content: Content) -> str:
    """Return the SHA-256 of a folded text, or of a picture's pixels: the same digest, the same row."""
    return content.digest if isinstance(content, Picture) else digest_text(fold(content))


def assemble(name: str, train: Iterable[Row], held_out: Iterable[Row] | None) -> LabelledSet:
    """Return a clean set: texts folded, empty and repeated rows dropped, none of `held_out` also in `train`.

    Without `held_out`, a seeded share of each class is held out. The first of several equal rows is kept.
    """
    seen: set[str] = set()
    train_rows = _distinct(train, seen)
    if held_out is None:
        train_rows, held_out_rows = _hold_out(train_rows, HELD_OUT_SHARE, SPLIT_SEED)
    else:
        held_out_rows = _distinct(held_out, seen)
    labels = tuple(sorted({label for _, label in train_rows}))
    return LabelledSet(name, labels, train_rows, [row for row in held_out_rows if row[1] in labels])


def _distinct(rows: Iterable[Row], seen: set[str]) -> list[Row]:
    kept: list[Row] = []
    for content, label in rows:
        clean = fold(content) if isinstance(content, str) else content
        digest = content_digest(clean)
        if clean and digest not in seen:
            seen.add(digest)
            kept.append((clean, label))
    return kept


def _hold_out(rows: list[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Split off `share` of each class, rounded down so that training keeps every class; in file order."""
    by_label: dict[str, list[int]] = {}
    for index, (_, label) in enumerate(rows):
        by_label.setdefault(label, []).append(index)
    draw = random.Random(seed)  # noqa: S311 - a split, not a secret
    held: set[int] = set()
    for label in sorted(by_label):
        indices = by_label[label]
        held.update(draw.sample(indices, math.floor(len(indices) * share)))
    train = [row for index, row in enumerate(rows) if index not in held]
    return train, [row for index, row in enumerate(rows) if index in held]
