from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bmm.part import SIZE_PATTERN
from bmm.sizes import parse_bytes, readable_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [("100B", 100), ("2GiB", 2 * 2**30), ("500 MB", 500 * 10**6), ("1.5KiB", 1536), ("1kB", 1000), ("3TiB", 3 * 2**40)],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert re.match(SIZE_PATTERN, text)
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (5 * 2**20, "5 MiB"),
        (3 * 2**29, "1.5 GiB"),
        (2**42, "4096.0 GiB"),
    ],
)
def test_sizes_are_written_as_people_read_them(size: int, text: str) -> None:
    assert readable_bytes(size) == text


@given(st.integers(1, 2**44))
def test_what_is_written_may_stand_in_a_recipe_and_is_nearly_what_it_was(size: int) -> None:
    text = readable_bytes(size)
    assert re.match(SIZE_PATTERN, text)
    assert parse_bytes(text) == pytest.approx(size, rel=0.51, abs=1)
