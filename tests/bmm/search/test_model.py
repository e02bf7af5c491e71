from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from bmm.search import model
from bmm.search.model import fitted_to_objective, points_of, reproducible
from bmm.search.space import Space
from bmm.search.trial import Trial

SPACE = Space(("a", "b"), (-4.0, 2.0), (0.9, 1.1))


def smooth(point: tuple[float, ...]) -> float:
    return 0.9 + 0.05 * float(np.sin(4 * point[0]) + np.cos(5 * point[2]))


def some_trials(deviation: float, told: float) -> list[Trial]:
    """Return trials of a smooth objective with noise of one deviation, whose rows tell of another."""
    draw = np.random.default_rng(0)
    trials = []
    for index in range(40):
        point = tuple(float(value) for value in draw.random(SPACE.dimensions).round(6))
        value = smooth(point) + float(draw.normal(0, deviation))
        trials.append(
            Trial(
                index, "sobol", SPACE.decode(point), value, {"t": value}, point, "complete", None, 0, variance=told**2
            )
        )
    return trials


SHARES = (1.0, 0.3, 0.1, 0.03)


def error(trials: list[Trial], shares: tuple[float, ...] = SHARES) -> float:
    """Return the root mean squared error of the posterior mean where there were no trials."""
    with reproducible(0):
        process = fitted_to_objective(trials, None, shares=shares)
        places = torch.rand(200, SPACE.dimensions, dtype=torch.float64)
        with torch.no_grad():
            means = process.posterior(places).mean.squeeze(-1).numpy()
    assert not process.training
    return float(np.sqrt(np.mean((means - [smooth(tuple(place)) for place in places.tolist()]) ** 2)))


def test_rows_that_tell_of_too_much_noise_are_not_believed() -> None:
    exact, overstated = error(some_trials(0.002, 0.002)), error(some_trials(0.002, 0.01))
    assert overstated < 1.5 * exact
    assert overstated < error(some_trials(0.002, 0.01), (1.0,))
    # What is truly noisy is still smoothed.
    assert error(some_trials(0.02, 0.02)) < 0.02


def test_the_model_is_the_same_each_time() -> None:
    trials = some_trials(0.002, 0.01)
    again = [replace(trial) for trial in trials]
    means = []
    for known in (trials, again):
        with reproducible(3), torch.no_grad(), torch.enable_grad():
            means.append(fitted_to_objective(known, None, shares=SHARES).posterior(points_of(known)).mean.detach())
    assert torch.equal(*means)


def test_where_no_noise_is_known_it_is_inferred() -> None:
    trials = [replace(trial, variance=None) for trial in some_trials(0.002, 0.01)]
    assert error(trials) == pytest.approx(error(some_trials(0.002, 0.002)), rel=0.5)


def test_no_share_is_taken_whose_evidence_is_not_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    trials = some_trials(0.002, 0.01)
    without, honest, seen = error(trials, SHARES[1:]), model._log_evidence, []

    # A fit that ends there needs a search of hundreds of trials: made by hand.
    def first_is_no_number(found: Any) -> float:
        seen.append(found)
        return float("nan") if len(seen) == 1 else honest(found)

    monkeypatch.setattr(model, "_log_evidence", first_is_no_number)
    assert error(trials) == pytest.approx(without)
    monkeypatch.setattr(model, "_log_evidence", lambda _: float("nan"))
    with reproducible(0), pytest.raises(ArithmeticError, match="evidence is a number"):
        fitted_to_objective(trials, None, shares=SHARES)
