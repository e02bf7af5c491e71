"""The noise between trials that answer the same rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bmm.search.rows import decoded, encoded, is_whole, variance_of_difference, variances

seeds = st.integers(0, 2**20)


def rows(generator: np.random.Generator, count: int) -> dict[str, NDArray[np.float64]]:
    return {"a": generator.normal(size=count), "b": generator.normal(size=count + 3)}


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(2, 12))
def test_what_rows_have_in_common_is_no_noise(seed: int, count: int) -> None:
    generator = np.random.default_rng(seed)
    common = rows(generator, count)
    shifted = [{task: common[task] + shift for task in common} for shift in (0.0, 0.3, -2.0)]
    assert variances(shifted) == pytest.approx([0.0, 0.0, 0.0], abs=1e-25)
    assert variance_of_difference(shifted[0], shifted[2]) == pytest.approx(0.0, abs=1e-25)


@settings(max_examples=25, deadline=None)
@given(seeds)
def test_of_two_trials_each_has_half_of_their_differences_variance(seed: int) -> None:
    generator = np.random.default_rng(seed)
    one, other = rows(generator, 9), rows(generator, 9)
    apart = variance_of_difference(one, other)
    by_hand = sum((one[task] - other[task]).var(ddof=1) / len(one[task]) for task in one) / 4
    assert apart == pytest.approx(by_hand)
    assert variances([one, other]) == pytest.approx([apart / 2, apart / 2])


def test_independent_rows_have_their_own_variance() -> None:
    generator = np.random.default_rng(0)
    trials = [{"a": generator.normal(size=4000)} for _ in range(12)]
    found = variances(trials)
    assert found == pytest.approx([1 / 4000] * 12, rel=0.1)


def test_a_stopped_trial_counts_by_the_rows_it_has_seen_and_not_for_the_mean() -> None:
    generator = np.random.default_rng(1)
    one, other, stopped = (rows(generator, 20) for _ in range(3))
    stopped["a"][5:] = np.nan
    assert is_whole(one)
    assert not is_whole(stopped)
    found = variances([one, stopped, other])
    assert found is not None
    both = variances([one, other])
    assert both is not None
    assert [found[0], found[2]] == both
    mean = {task: (one[task] + other[task]) / 2 for task in one}
    seen = {"a": slice(0, 5), "b": slice(None)}
    by_hand = sum((stopped[task] - mean[task])[part].var(ddof=1) / len(mean[task][part]) for task, part in seen.items())
    assert found[1] == pytest.approx(by_hand / 4)


def test_one_trial_alone_has_nothing_to_be_compared_with() -> None:
    assert variances([]) is None
    assert variances([{"a": np.ones(3)}]) is None


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(width=64), max_size=6))
def test_rows_come_back_to_the_last_bit(values: list[float]) -> None:
    given_rows = {"b": np.array(values), "a": np.array([0.1, np.nan])}
    back = decoded(encoded(given_rows))
    assert {task: found.tobytes() for task, found in back.items()} == {
        task: found.tobytes() for task, found in given_rows.items()
    }
    with pytest.raises(ValueError, match="base64"):
        decoded({"a": "no rows!"})
