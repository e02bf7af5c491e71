"""Proposals: near the best trial, reproducible from the log, and never a crash."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import pytest
import torch

from bmm.errors import BMMError
from bmm.search.plan import Plan, trial_seed
from bmm.search.propose import LINE_POINTS, initial_design, local_sobol_points, propose
from bmm.search.region import (
    FAILURES_TO_SHRINK,
    FIRST_LENGTH,
    LARGEST_LENGTH,
    SMALLEST_LENGTH,
    SUCCESSES_TO_GROW,
    trust_region,
)
from bmm.search.settings import Searcher
from bmm.search.space import Point, Space
from bmm.search.trial import Origin, Trial

SPACE = Space(("attention", "mlp"), (-4.0, 2.0), (0.5, 1.5))


PLAN = Plan(trials=40, seed=0)
DESIGNED = 1 + LINE_POINTS + 2
"""The anchor, the line of λ, and γ at both ends."""


def proposed(space: Space, history: list[Trial], plan: Plan, index: int) -> tuple[Origin, Point]:
    """Propose with nothing under way."""
    return propose(space, history, {trial.index: (trial.origin, trial.point) for trial in history}, plan, index)


def a_trial(space: Space, index: int, origin: Origin, point: Point, objective: float | None) -> Trial:
    return Trial(
        index=index,
        origin=origin,
        settings=space.decode(point),
        objective=objective,
        tasks={},
        point=point,
        state="failed" if objective is None else "complete",
        reason=None if objective is not None else "diverged",
        seed=index,
    )


def a_history(space: Space = SPACE, count: int = 14, seed: int = 0) -> list[Trial]:
    """The initial design, the Sobol points and some Bayesian ones, best near the cube's centre."""
    draw = random.Random(seed)
    points = [(origin, point) for origin, point, _ in initial_design(space, PLAN)]
    points += [("global", space.encode(ends)) for ends in space.across(space.decode(points[1][1]))]
    while len(points) < count:
        origin: Origin = "sobol" if len(points) < DESIGNED + local_sobol_points(space) else "bayesian"
        points.append((origin, tuple(draw.random() for _ in range(space.dimensions))))
    return [
        a_trial(space, index, origin, point, -sum((value - 0.5) ** 2 for value in point))
        for index, (origin, point) in enumerate(points)
    ]


def test_the_design_is_the_anchor_and_then_the_global_line() -> None:
    design = initial_design(SPACE, PLAN)
    assert [origin for origin, _, _ in design] == ["anchor"] + ["global"] * LINE_POINTS
    assert design[0][2] == SPACE.anchor()
    assert all(SPACE.decode(point) == settings for _, point, settings in design)
    assert all(len({setting.lam for setting in settings.values()}) == 1 for _, _, settings in design)


def test_the_strength_of_the_walk_is_tried_right_after_the_anchor() -> None:
    plain, with_reference = (initial_design(SPACE, replace(PLAN, reference=lam)) for lam in (None, 0.3))
    assert with_reference[0] == plain[0]
    assert with_reference[2:] == plain[1:]
    origin, _, settings = with_reference[1]
    assert origin == "global"
    assert {(setting.lam, setting.gamma) for setting in settings.values()} == {(0.3, 1.0)}
    assert initial_design(SPACE, replace(PLAN, reference=1e9)) == plain
    # The middle of the line is tried once.
    assert len(initial_design(SPACE, replace(PLAN, reference=0.1))) == len(plain)


@pytest.mark.parametrize("searcher", ["random", "sobol", "cma-es"])
def test_rivals_start_from_the_anchor_and_the_walk_alone(searcher: Searcher) -> None:
    design = initial_design(SPACE, replace(PLAN, searcher=searcher, reference=0.1))
    assert [origin for origin, _, _ in design] == ["anchor", "global"]


def test_gamma_goes_to_its_ends_in_all_groups_at_the_best_of_the_line() -> None:
    history = [
        a_trial(SPACE, index, origin, point, -abs(index - 5))
        for index, (origin, point, _) in enumerate(initial_design(SPACE, PLAN))
    ]
    best = history[5].settings
    for gamma in (1.5, 0.5):
        origin, point = proposed(SPACE, history, PLAN, len(history))
        assert origin == "global"
        assert SPACE.decode(point) == {group: replace(setting, gamma=gamma) for group, setting in best.items()}
        # What is found there does not move the other end.
        history.append(a_trial(SPACE, len(history), origin, point, 1.0))
    assert proposed(SPACE, history, PLAN, len(history))[0] == "sobol"


def test_without_a_line_nothing_lies_across_it() -> None:
    failed = [
        a_trial(SPACE, index, origin, point, None if index else 0.0)
        for index, (origin, point, _) in enumerate(initial_design(SPACE, PLAN))
    ]
    assert proposed(SPACE, failed, PLAN, len(failed))[0] == "sobol"
    fixed = Space(("attention", "mlp"), (-4.0, 2.0), (1.0, 1.0))
    history = [
        a_trial(fixed, index, origin, point, float(index))
        for index, (origin, point, _) in enumerate(initial_design(fixed, PLAN))
    ]
    assert proposed(fixed, history, PLAN, len(history))[0] == "sobol"


def test_sobol_points_lie_in_the_box_around_the_best() -> None:
    history = a_history(count=DESIGNED)
    region = trust_region(history)
    seen = set()
    for index in range(DESIGNED, DESIGNED + local_sobol_points(SPACE)):
        origin, point = proposed(SPACE, history, PLAN, index)
        assert origin == "sobol"
        assert all(low <= value <= high for low, value, high in zip(region.lower, point, region.upper, strict=True))
        seen.add(point)
        history.append(a_trial(SPACE, index, origin, point, -9.0))
    assert len(seen) == local_sobol_points(SPACE)
    assert proposed(SPACE, history, PLAN, len(history))[0] == "bayesian"


@pytest.mark.parametrize("noise", [None, 1e-4])
def test_a_proposal_depends_on_the_logged_history_alone(noise: float | None) -> None:
    history = a_history()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = proposed(SPACE, history, replace(PLAN, seed=5, noise=noise), 14)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        reread = [Trial.from_json(json.loads(json.dumps(trial.to_json()))) for trial in history]
        assert proposed(SPACE, reread, replace(PLAN, seed=5, noise=noise), 14) == first
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    region = trust_region(history)
    assert first[0] == "bayesian"
    assert all(low <= value <= high for low, value, high in zip(region.lower, first[1], region.upper, strict=True))


def test_seed_and_index_tell_draws_apart() -> None:
    history = a_history(count=DESIGNED)
    one, other = (proposed(SPACE, history, replace(PLAN, seed=seed), DESIGNED) for seed in (0, 1))
    assert one != other
    seeds = {trial_seed(seed, index) for seed in range(5) for index in range(5)}
    assert len(seeds) == 25
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_the_box_stays_in_the_cube_with_its_full_length() -> None:
    history = [a_trial(SPACE, 0, "anchor", SPACE.anchor_point(), 1.0)]
    region = trust_region(history)
    assert region.length == FIRST_LENGTH
    assert region.lower == pytest.approx((0.2, 0.1, 0.2, 0.1))
    assert region.upper == pytest.approx((1.0, 0.9, 1.0, 0.9))


def test_the_box_grows_with_successes_and_shrinks_with_failures() -> None:
    history = [a_trial(SPACE, 0, "anchor", SPACE.anchor_point(), 0.0)]

    def after(objectives: list[float | None]) -> float:
        for objective in objectives:
            history.append(a_trial(SPACE, len(history), "bayesian", (0.5,) * 4, objective))
        return trust_region(history).length

    assert after([1.0, 2.0][:SUCCESSES_TO_GROW]) == LARGEST_LENGTH
    assert after([3.0, 4.0]) == LARGEST_LENGTH
    assert after([4.0, None] + [0.0] * (FAILURES_TO_SHRINK - 3)) == LARGEST_LENGTH
    assert after([0.0]) == LARGEST_LENGTH / 2
    lengths = [after([0.0] * FAILURES_TO_SHRINK) for _ in range(6)]
    assert min(lengths) >= SMALLEST_LENGTH
    assert lengths[:4] == pytest.approx([0.2, 0.1, 0.05, FIRST_LENGTH])
    assert after([5.0, 6.0]) == pytest.approx(0.4)


def test_without_a_complete_trial_there_is_nothing_to_search_around() -> None:
    with pytest.raises(BMMError, match="no trial"):
        proposed(SPACE, [a_trial(SPACE, 0, "anchor", SPACE.anchor_point(), None)], PLAN, 1)


@pytest.mark.parametrize("failure", ["not positive definite", "fit", "nan"])
def test_a_numerical_failure_falls_back_to_a_seeded_draw(failure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import botorch.fit
    import botorch.optim
    from botorch.exceptions import ModelFittingError
    from linear_operator.utils.errors import NotPSDError

    attempts = []

    def fail(*arguments: object, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
        attempts.append(failure)
        match failure:
            case "not positive definite":
                raise NotPSDError("not positive definite")
            case "fit":
                raise ModelFittingError("all attempts failed")
        return torch.full((1, SPACE.dimensions), math.nan, dtype=torch.float64), torch.tensor(0.0)

    if failure == "nan":
        monkeypatch.setattr(botorch.optim, "optimize_acqf", fail)
    else:
        monkeypatch.setattr(botorch.fit, "fit_gpytorch_mll", fail)
    origin, point = proposed(SPACE, a_history(), replace(PLAN, seed=3), 14)
    assert origin == "sobol"
    assert len(attempts) == 2
    assert proposed(SPACE, a_history(), replace(PLAN, seed=3), 14) == ("sobol", point)


def test_a_mistake_of_ours_is_not_taken_for_a_numerical_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    import botorch.fit

    def fail(*arguments: object, **options: object) -> None:
        raise TypeError("no such option")

    monkeypatch.setattr(botorch.fit, "fit_gpytorch_mll", fail)
    with pytest.raises(TypeError):
        proposed(SPACE, a_history(), replace(PLAN, seed=3), 14)


@pytest.mark.parametrize("kind", ["constant", "failed", "huge", "repeated"])
def test_awkward_histories_still_give_a_point(kind: str) -> None:
    history = a_history()
    match kind:
        case "constant":
            history = [a_trial(SPACE, t.index, t.origin, t.point, 0.5) for t in history]
        case "failed":
            history = history[:1] + [a_trial(SPACE, t.index, t.origin, t.point, None) for t in history[1:]]
        case "huge":
            history = [a_trial(SPACE, t.index, t.origin, t.point, 1e12 * (t.index % 3)) for t in history]
        case _:
            history += [a_trial(SPACE, 14 + i, "bayesian", history[5].point, 0.1) for i in range(6)]
    _, point = proposed(SPACE, history, PLAN, len(history))
    assert SPACE.decode(point) not in [trial.settings for trial in history]


def test_a_space_of_one_group_a_module_is_searched_too() -> None:
    space = Space(tuple(f"layer.{number}" for number in range(36)), (-4.0, 2.0), (0.5, 1.5))
    history = a_history(space, 16)
    origin, point = proposed(space, history, PLAN, 16)
    assert origin == "bayesian"
    assert set(space.decode(point)) == set(space.groups)
