"""Shares and intervals against closed forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import norm

import bmm.evaluation.metrics as metrics
from bmm.errors import DataError
from bmm.evaluation.metrics import (
    Bootstrap,
    Interval,
    Measured,
    mean_ratio_to_expert,
    share_of_experts,
)
from bmm.evaluation.scores import ACCURACY, share
from bmm.evaluation.summary import summarise

SETTINGS: dict[str, Any] = {"samples": 500, "seed": 0, "confidence": 0.95}
MODELS = ("base", "expert", "anchor", "merged")


def right(rows: NDArray[np.bool_]) -> Measured:
    return Measured(ACCURACY, share(rows))


def made(correct: int, rows: int) -> Measured:
    return right(np.arange(rows) < correct)


@st.composite
def tables(draw: st.DrawFn, models: tuple[str, ...] = MODELS) -> dict[str, dict[str, Measured]]:
    result = {}
    for task in range(draw(st.integers(1, 3))):
        rows = draw(st.integers(4, 60))
        generator = np.random.default_rng(draw(st.integers(0, 2**32)))
        shares = {model: draw(st.floats(0.2, 1)) for model in models}
        result[f"task {task}"] = {model: right(generator.random(rows) < level) for model, level in shares.items()}
        result[f"task {task}"]["expert"].statistics[0, 0] = 1.0
    return result


def test_the_two_shares_differ() -> None:
    expert, model = {"a": 0.8, "b": 0.4}, {"a": 0.8, "b": 0.2}
    assert share_of_experts(model, expert) == pytest.approx(1.0 / 1.2)
    assert mean_ratio_to_expert(model, expert) == pytest.approx((1 + 0.5) / 2)


def test_experts_of_accuracy_zero() -> None:
    assert share_of_experts({"a": 0.5, "b": 0.5}, {"a": 0.0, "b": 1.0}) == 1.0
    with pytest.raises(DataError, match="the expert of a has the score 0"):
        mean_ratio_to_expert({"a": 0.5, "b": 0.5}, {"a": 0.0, "b": 1.0})
    with pytest.raises(DataError, match="the experts' mean score is not above 0"):
        share_of_experts({"a": 0.5}, {"a": 0.0})
    with pytest.raises(DataError, match="the experts' mean score is not above 0"):
        summarise({"a": {**dict.fromkeys(MODELS, made(2, 4)), "expert": made(0, 4)}}, **SETTINGS)


def test_resamples_without_a_right_expert_are_left_out() -> None:
    interval = Bootstrap({"a": {"expert": made(1, 3), "merged": made(2, 3)}}, **SETTINGS).share_of_experts("merged")
    # A resample of three rows in which the expert is right once or more makes the share 1, 3/2, 2 or 3.
    assert 1 <= interval.low <= interval.high <= 3


@settings(deadline=None, max_examples=25)
@given(tables())
def test_intervals_contain_the_point_estimates(correct: dict[str, dict[str, Measured]]) -> None:
    bootstrap = Bootstrap(correct, **SETTINGS)
    exact = {model: {task: arrays[model].score for task, arrays in correct.items()} for model in MODELS}
    for model in MODELS:
        for task, value in exact[model].items():
            interval = bootstrap.score(task, model)
            assert interval.low <= value <= interval.high
        mean = bootstrap.mean(model)
        assert mean.low <= np.mean(list(exact[model].values())) <= mean.high
        share = bootstrap.share_of_experts(model)
        assert share.low <= share_of_experts(exact[model], exact["expert"]) + 1e-12
        assert share.high >= share_of_experts(exact[model], exact["expert"]) - 1e-12


def test_the_share_of_several_models_is_that_of_all_their_resamples() -> None:
    low, high = made(100, 400), made(300, 400)
    bootstrap = Bootstrap({"a": {"expert": made(400, 400), "low": low, "high": high}}, **SETTINGS)
    one, other, both = (bootstrap.share_of_experts(*models) for models in (["low"], ["high"], ["low", "high"]))
    assert one.low <= both.low < 0.25 < 0.75 < both.high <= other.high
    # A tail of 2.5 % of all resamples is one of 5 % of those of the lower model.
    assert both.low > one.low
    assert bootstrap.share_of_experts("low", "low") == one


@pytest.mark.parametrize("rows", [400, 1000])
@pytest.mark.parametrize("share", [0.5, 0.9])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_intervals_agree_with_the_normal_approximation(rows: int, share: float, confidence: float) -> None:
    bootstrap = Bootstrap({"a": {"m": made(int(share * rows), rows)}}, samples=4000, seed=1, confidence=confidence)
    half = norm.ppf((1 + confidence) / 2) * np.sqrt(share * (1 - share) / rows)
    interval = bootstrap.score("a", "m")
    assert interval.low == pytest.approx(share - half, abs=0.12 * half)
    assert interval.high == pytest.approx(share + half, abs=0.12 * half)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    generator = np.random.default_rng(5)
    covered = 0
    for seed in range(120):
        correct = {"a": {"m": right(generator.random(150) < 0.7)}}
        interval = Bootstrap(correct, samples=400, seed=seed, confidence=0.9).score("a", "m")
        covered += interval.low <= 0.7 <= interval.high
    # 120 draws at 0.9 have a standard deviation of 0.027.
    assert 0.9 - 3 * 0.027 <= covered / 120 <= 0.9 + 3 * 0.027


def test_all_correct_leaves_nothing_to_doubt() -> None:
    correct = {task: dict.fromkeys(MODELS, made(7, 7)) for task in ("a", "b")}
    summary = summarise(correct, **SETTINGS)
    assert summary["a"]["intervals"]["merged"] == [1.0, 1.0]
    assert summary["mean"]["intervals"]["share_of_experts"]["merged"] == [1.0, 1.0]


@settings(deadline=None, max_examples=15)
@given(tables())
def test_differences_are_paired(correct: dict[str, dict[str, Measured]]) -> None:
    correct = {task: {**models, "twin": models["merged"]} for task, models in correct.items()}
    bootstrap = Bootstrap(correct, **SETTINGS)
    assert bootstrap.difference("merged", "twin") == Interval(0.0, 0.0)
    for task in correct:
        assert bootstrap.difference("merged", "twin", task) == Interval(0.0, 0.0)
        there, back = (bootstrap.difference(*pair, task) for pair in (("merged", "anchor"), ("anchor", "merged")))
        assert (there.low, there.high) == pytest.approx((-back.high, -back.low))


def test_pairing_narrows_the_difference_to_the_rows_that_differ() -> None:
    rows = 1000
    merged, anchor = made(700, rows), made(680, rows)
    interval = Bootstrap({"a": {"merged": merged, "anchor": anchor}}, **SETTINGS).difference("merged", "anchor", "a")
    half = 1.96 * np.sqrt(0.02 * 0.98 / rows)
    assert interval.low == pytest.approx(0.02 - half, abs=0.3 * half)
    assert interval.high == pytest.approx(0.02 + half, abs=0.3 * half)


def test_other_models_tasks_and_piece_sizes_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    one = {"a": {"m": made(30, 50)}}
    more = {"b": {"x": made(2, 5), "m": made(1, 5)}, "a": {"x": made(9, 50), "m": made(30, 50)}}
    alone = Bootstrap(one, **SETTINGS)
    monkeypatch.setattr(metrics, "_COUNTS_BYTES", 8 * 50 * 7)
    beside = Bootstrap(more, **SETTINGS)
    assert alone.score("a", "m") == beside.score("a", "m")
    assert alone.score("a", "m") != Bootstrap(one, **{**SETTINGS, "seed": 1}).score("a", "m")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_variance_of_an_accuracy_is_the_binomials(share: float) -> None:
    rows = np.arange(200) < 200 * share
    assert right(rows).variance == pytest.approx(share * (1 - share) / 199)
    assert right(np.ones(1, dtype=bool)).variance == 0
