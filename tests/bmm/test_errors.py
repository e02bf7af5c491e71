from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from bmm.errors import one_line


@settings(deadline=None, max_examples=25)
@given(st.text())
def test_what_a_library_says_is_one_short_line_that_is_not_empty(text: str) -> None:
    said = one_line(ValueError(text))
    assert 0 < len(said) <= 300
    assert len(said.splitlines()) == 1
    assert said in (" ".join(text.split())[:300], "ValueError")
