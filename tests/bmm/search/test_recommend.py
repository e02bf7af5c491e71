from __future__ import annotations

import random
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from bmm.search.propose import trial_seed
from bmm.search.recommend import recommended
from bmm.search.space import Space
from bmm.search.study import Trial, best_of

SPACE = Space(("a", "b"), (-4.0, 2.0), (0.9, 1.1))
NOISE = 0.02**2


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
        chosen, luckiest = recommended(trials, 0, NOISE), best_of(tuple(trials))
        assert chosen is not None
        assert luckiest is not None
        gain.append(true_value(chosen.point) - true_value(luckiest.point))
    assert sum(gain) / len(gain) > 0.002
    assert any(value > 0 for value in gain)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 999))
def test_no_choice_measured_below_the_anchor(seed: int) -> None:
    trials = study(seed, 0.05, 8)
    chosen = recommended(trials, 0, 0.05**2)
    assert chosen is not None
    assert chosen.objective is not None
    assert trials[0].objective is not None
    assert chosen.objective >= trials[0].objective


def test_without_noise_or_with_too_few_trials_the_highest_is_taken() -> None:
    trials = study(3, NOISE**0.5)
    assert recommended(trials, 0, None) == best_of(tuple(trials))
    assert recommended(trials[:2], 0, NOISE) == best_of(tuple(trials[:2]))
    assert recommended([], 0, NOISE) is None


def test_the_same_trials_give_the_same_choice() -> None:
    trials = study(5, NOISE**0.5)
    assert recommended(trials, 0, NOISE) == recommended(trials, 0, NOISE)


def test_a_plain_setting_is_kept_unless_another_is_better_by_more_than_the_noise() -> None:
    trials = study(7, 0.001)
    line = SPACE.global_line(4)[1]
    for gap, plain in ((0.01, True), (0.2, False)):
        best = max(trial.objective for trial in trials if trial.objective is not None)
        own = replace(trials[1], origin="global", point=line, settings=SPACE.decode(line), objective=best - gap)
        anchor = replace(trials[0], objective=best - 0.3)
        chosen = recommended([anchor, own, *trials[2:]], 0, NOISE)
        assert chosen is not None
        assert (chosen.origin == "global") == plain


def test_of_plain_settings_that_of_the_walk_is_preferred() -> None:
    trials = study(3, 0.0)
    for index, lam in ((1, 0.1), (2, 0.4)):
        point = SPACE.plain_point(lam)
        assert point is not None
        best = max(trial.objective or 0 for trial in trials)
        trials[index] = replace(
            trials[index], origin="global", point=point, settings=SPACE.decode(point), objective=best + 0.001 * index
        )
    chosen = {reference: recommended(trials, 0, NOISE, reference) for reference in (None, 0.1, 0.4, 3.0)}
    assert chosen[0.1] == trials[1]
    assert chosen[0.4] == trials[2]
    assert chosen[None] == chosen[3.0]
