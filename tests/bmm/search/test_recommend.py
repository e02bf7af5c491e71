from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from bmm.search.plan import Plan, trial_seed
from bmm.search.recommend import pareto_front, recommended
from bmm.search.space import Space
from bmm.search.trial import Trial, best_of

SPACE = Space(("a", "b"), (-4.0, 2.0), (0.9, 1.1))
NOISE = 0.02**2


def plan(noise: float | None = NOISE, reference: float | None = None) -> Plan:
    return Plan(trials=20, seed=0, noise=noise, reference=reference)


def true_value(point: tuple[float, ...]) -> float:
    return 0.98 - 0.1 * (point[0] - 0.5) ** 2 - 0.1 * (point[2] - 0.4) ** 2


def study(seed: int, noise: float, trials: int = 20) -> list[Trial]:
    draw = random.Random(seed)
    points = [SPACE.anchor_point()]
    points += [tuple(round(draw.random(), 6) for _ in range(SPACE.dimensions)) for _ in range(trials - 1)]
    return [
        Trial(
            index=index,
            origin="anchor" if index == 0 else "sobol",
            settings=SPACE.decode(point),
            objective=true_value(point) + draw.gauss(0, noise),
            tasks={},
            point=point,
            state="complete",
            reason=None,
            seed=trial_seed(0, index),
        )
        for index, point in enumerate(points)
    ]


def test_the_smoothed_choice_is_truly_better_than_the_luckiest_on_average() -> None:
    gain = []
    for seed in range(12):
        trials = study(seed, NOISE**0.5)
        chosen, luckiest = recommended(SPACE, trials, plan()), best_of(trials)
        assert chosen is not None
        assert luckiest is not None
        gain.append(true_value(chosen.point) - true_value(luckiest.point))
    assert sum(gain) / len(gain) > 0.002
    assert any(value > 0 for value in gain)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 999))
def test_no_choice_measured_below_the_anchor(seed: int) -> None:
    trials = study(seed, 0.05, 8)
    chosen = recommended(SPACE, trials, plan(0.05**2))
    assert chosen is not None
    assert chosen.objective is not None
    assert trials[0].objective is not None
    assert chosen.objective >= trials[0].objective


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 999))
def test_no_choice_keeps_less_of_the_experts_than_the_anchor_whatever_the_objective(seed: int) -> None:
    draw = random.Random(seed)
    trials = [
        replace(trial, tasks={"a": draw.uniform(0.7, 0.9), "b": draw.uniform(0.4, 0.5)})
        for trial in study(seed, 0.05, 8)
    ]
    asked = replace(plan(0.05**2), experts={"a": 0.9, "b": 0.5})
    chosen = recommended(SPACE, trials, asked)
    assert chosen is not None
    assert asked.mean(chosen) >= asked.mean(trials[0])
    assert (chosen.objective or 0.0) >= (trials[0].objective or 0.0)


def test_what_is_best_by_the_objective_alone_is_not_taken() -> None:
    trials = [
        replace(trial, objective=objective, tasks={"a": share})
        for trial, objective, share in zip(study(0, 0.0, 3), (-0.5, -0.3, -0.4), (0.8, 0.7, 0.81), strict=True)
    ]
    guarded = replace(plan(None), experts={"a": 1.0})
    assert recommended(SPACE, trials, guarded) == trials[2]
    assert recommended(SPACE, trials[:2], guarded) == trials[0]
    assert recommended(SPACE, trials, plan(None)) == trials[1]


def test_without_noise_or_with_too_few_trials_the_highest_is_taken() -> None:
    trials = study(3, NOISE**0.5)
    assert recommended(SPACE, trials, plan(None)) == best_of(trials)
    assert recommended(SPACE, trials[:2], plan()) == best_of(trials[:2])
    assert recommended(SPACE, [], plan()) is None


def test_the_same_trials_give_the_same_choice() -> None:
    trials = study(5, NOISE**0.5)
    assert recommended(SPACE, trials, plan()) == recommended(SPACE, trials, plan())


def with_walks(trials: list[Trial], lam: float, gap: float) -> list[Trial]:
    """Give the second trial the setting of a walk, so much below the best, and let the anchor be far below."""
    settings = SPACE.plain(lam)
    assert settings is not None
    best = max(trial.objective for trial in trials if trial.objective is not None)
    own = replace(trials[1], origin="global", point=SPACE.encode(settings), settings=settings, objective=best - gap)
    return [replace(trials[0], objective=best - 0.3), own, *trials[2:]]


def test_a_walks_own_setting_is_kept_unless_another_is_better_by_more_than_the_noise() -> None:
    for gap, kept in ((0.01, True), (0.2, False)):
        trials = with_walks(study(7, 0.001), 0.1, gap)
        chosen = recommended(SPACE, trials, plan(reference=0.1))
        assert chosen is not None
        assert (chosen == trials[1]) == kept
        # To no other search is that setting anything special, nor to one whose trials all walk.
        assert recommended(SPACE, trials, replace(plan(reference=0.1), preferred=False)) != trials[1]
        assert recommended(SPACE, trials, plan()) != trials[1]


def test_the_error_is_that_of_the_difference_where_trials_share_their_rows() -> None:
    """A gap of half the rows' standard error, which nearly all rows agree on, is a difference."""
    trials = with_walks(study(7, 0.001), 0.1, 0.01)
    draw = np.random.default_rng(0)
    hard = draw.normal(0, 0.4, 400)
    with_rows = [
        replace(trial, gains={"a": (trial.objective or 0.0) + hard + draw.normal(0, 0.01, 400)}) for trial in trials
    ]
    apart = [recommended(SPACE, found, plan(reference=0.1)) for found in (trials, with_rows)]
    assert apart[0] == trials[1]
    assert apart[1] is not None
    assert apart[1].origin == "sobol"


def test_the_setting_of_the_walk_and_no_other_is_preferred() -> None:
    trials = study(3, 0.0)
    for index, lam in ((1, 0.1), (2, 0.4)):
        settings = SPACE.plain(lam)
        assert settings is not None
        best = max(trial.objective or 0 for trial in trials)
        trials[index] = replace(
            trials[index],
            origin="global",
            point=SPACE.encode(settings),
            settings=settings,
            objective=best + 0.001 * index,
        )
    chosen = {reference: recommended(SPACE, trials, plan(reference=reference)) for reference in (None, 0.1, 0.4, 3.0)}
    assert chosen[0.1] == trials[1]
    assert chosen[0.4] == trials[2]
    assert chosen[None] == chosen[3.0]


def test_floors_come_before_the_mean_and_else_the_least_shortfall_does() -> None:
    trials = [replace(trial, tasks={"a": 0.5 + 0.02 * trial.index, "b": 0.8}) for trial in study(2, 0.0)]
    kept = Plan(trials=20, seed=0, experts={"a": 1.0, "b": 1.0}, floors={"a": 0.7})
    chosen = recommended(SPACE, trials, kept)
    assert chosen is not None
    assert chosen == best_of([trial for trial in trials if trial.tasks["a"] >= 0.7])
    out_of_reach = replace(kept, floors={"a": 2.0})
    assert recommended(SPACE, trials, out_of_reach) == trials[-1]


def test_an_anchor_that_keeps_the_floors_is_not_gone_below() -> None:
    trials = [replace(trial, tasks={"a": 0.9, "b": 0.8}) for trial in study(4, 0.0, 10)]
    # Lucky, where the trials around it say that it is not better than they.
    trials[0] = replace(trials[0], objective=max(trial.objective or 0 for trial in trials) + 0.001)
    kept = replace(plan(), experts={"a": 1.0, "b": 1.0}, floors={"a": 0.7})
    assert recommended(SPACE, trials, kept) == trials[0]
    missed = [replace(trials[0], tasks={"a": 0.6, "b": 0.8}), *trials[1:]]
    chosen = recommended(SPACE, missed, kept)
    assert chosen is not None
    assert chosen.index


def test_the_pareto_front_is_what_no_other_trial_beats() -> None:
    made = [
        replace(trial, objective=objective, tasks={"a": worst, "b": 1.0})
        for trial, (objective, worst) in zip(
            study(1, 0.0, 5), [(0.9, 0.5), (0.8, 0.7), (0.7, 0.6), (0.6, 0.9), (0.9, 0.4)], strict=True
        )
    ]
    two = Plan(trials=5, seed=0, experts={"a": 1.0, "b": 1.0}, worst_task=True)
    assert [trial.index for trial in pareto_front(made, two)] == [0, 1, 3]
