"""What a clean set promises, of texts and of pictures."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from bmm.zoo import sets
from bmm.zoo.pictures import Picture
from bmm.zoo.sets import Content, Row, assemble, content_digest, fold

PICTURES = st.binary(min_size=1, max_size=1).map(lambda pixels: Picture("L", 1, 1, pixels))
ROWS = st.lists(st.tuples(st.text(max_size=8) | PICTURES, st.sampled_from("abc")), max_size=60)


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
def test_a_set_has_no_repeats_and_its_parts_are_disjoint(train: list[Row], held_out: list[Row] | None) -> None:
    made = assemble("any", train, held_out)
    contents = [content for content, _ in made.train + made.held_out]
    assert len({content_digest(content) for content in contents}) == len(contents)
    assert all(fold(content) == content != "" for content in contents if isinstance(content, str))
    assert {label for _, label in made.train} == set(made.labels)
    assert {label for _, label in made.held_out} <= set(made.labels)
    assert made == assemble("any", list(train), held_out)


@given(ROWS)
@settings(max_examples=25, deadline=None)
def test_holding_out_loses_no_row_and_takes_its_share_of_each_class(rows: list[Row]) -> None:
    made = assemble("any", rows, None)
    first: dict[Content, str] = {}
    for content, label in rows:
        clean = fold(content) if isinstance(content, str) else content
        if clean:
            first.setdefault(clean, label)
    assert dict(made.train) | dict(made.held_out) == first
    counts, held = Counter(first.values()), Counter(label for _, label in made.held_out)
    for label, count in counts.items():
        assert held[label] == int(count * sets.HELD_OUT_SHARE)


def test_the_first_of_equal_texts_keeps_its_label() -> None:
    made = assemble("any", [("a  b", "x"), ("a b", "y"), ("c", "y")], [("a\tb", "x"), ("d", "y")])
    assert made.train == [("a b", "x"), ("c", "y")]
    assert made.held_out == [("d", "y")]
