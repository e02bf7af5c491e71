from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bmm.anchors.memory import anchor_bytes
from bmm.anchors.settings import Method


@pytest.mark.parametrize("method", get_args(Method))
def test_every_method_has_what_it_takes(method: str) -> None:
    # The files of base and experts, and the result; an average needs no more than that.
    least = anchor_bytes("average", 1000, 2.0, 3)
    assert least == 1000 * (4 * 2 + 4)
    assert least <= anchor_bytes(method, 1000, 2.0, 3) <= least + 1000 * 8 * 10


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(get_args(Method)), st.integers(1, 10**9), st.sampled_from([2.0, 4.0]), st.integers(1, 50))
def test_it_grows_with_the_largest_tensor_and_with_the_files(method: str, widest: int, size: float, count: int) -> None:
    found = anchor_bytes(method, widest, size, count)
    assert anchor_bytes(method, 2 * widest, size, count) == pytest.approx(2 * found, abs=1)
    assert anchor_bytes(method, widest, size, count + 1) - found == pytest.approx(widest * size, abs=1)
