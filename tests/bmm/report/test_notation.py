from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bmm.report import notation


@given(st.floats(min_value=-1, max_value=1))
@settings(deadline=None, max_examples=25)
def test_points_are_the_difference_in_per_cent(difference):
    assert float(notation.points(difference).replace("−", "-")) == pytest.approx(100 * difference, abs=0.0501)


def test_a_small_loss_is_not_a_signed_zero():
    assert notation.points(-0.0001) == "0.0"
