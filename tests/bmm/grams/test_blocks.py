from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bmm.grams.blocks import BEHIND, BLOCK, most_held


@given(shards=st.lists(st.integers(1, BLOCK), min_size=1, max_size=5), in_flight=st.integers(1, 99))
def test_experts_of_few_shards_have_all_of_them_until_the_end(shards: list[int], in_flight: int) -> None:
    assert most_held(shards, in_flight) == sum(shards)


@given(count=st.integers(BLOCK + 1, 10**6), in_flight=st.integers(1, 99))
def test_of_many_shards_a_few_blocks_are_there_at_once(count: int, in_flight: int) -> None:
    found = most_held([count], in_flight)
    assert found <= count + 1
    assert found <= (BEHIND + 1) * BLOCK + in_flight + 2
    # The sum over the next expert begins when what is left of this one is there.
    assert most_held([count, count], in_flight) <= found + BLOCK + 1


def test_ten_thousand_shards_of_sixteen_workers() -> None:
    assert most_held([10_000], 50) == 2 * 64 + 50 + 2
