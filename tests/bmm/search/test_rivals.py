"""Searchers for comparison: reproducible from the log, in the cube, and CMA-ES just as Optuna runs it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import optuna
import pytest

from bmm.search.outcome import Outcome
from bmm.search.plan import Plan, trial_seed
from bmm.search.region import as_point
from bmm.search.rows import GainsByTask
from bmm.search.run import search
from bmm.search.setting import Setting
from bmm.search.settings import Searcher
from bmm.search.space import Space
from bmm.search.study import Study

SPACE = Space(("attention", "mlp"), (-4.0, 2.0), (0.5, 1.5))


def measure(settings: Mapping[str, Setting], rival: GainsByTask | None = None) -> Outcome:
    point = SPACE.encode(settings)
    return Outcome(-sum((value - 0.3) ** 2 for value in point), {})


@pytest.mark.parametrize("searcher", ["random", "sobol", "cma-es"])
def test_a_study_that_is_carried_on_ends_as_one_that_ran_in_one_go(tmp_path: Path, searcher: Searcher) -> None:
    whole = search(SPACE, measure, Study.open(tmp_path / "whole", {}), Plan(trials=18, seed=2, searcher=searcher))
    for trials in (5, 11, 18):
        study = Study.open(tmp_path / "parts", {})
        parts = search(SPACE, measure, study, Plan(trials=trials, seed=2, searcher=searcher))
    assert parts == whole
    origins = [trial.origin for trial in whole.trials]
    assert origins == ["anchor"] + [searcher] * 17
    assert all(0 <= value <= 1 for trial in whole.trials for value in trial.point)
    other = search(SPACE, measure, Study.open(tmp_path / "other", {}), Plan(trials=18, seed=3, searcher=searcher))
    assert all(one.point != two.point for one, two in zip(whole.trials[1:], other.trials[1:], strict=True))


def test_cma_es_is_optunas_own(tmp_path: Path) -> None:
    trials = 30
    plan = Plan(trials=trials, seed=0, searcher="cma-es")
    found = search(SPACE, measure, Study.open(tmp_path / "log", {}), plan).trials
    names = [f"x{place:04d}" for place in range(SPACE.dimensions)]
    box = {name: optuna.distributions.FloatDistribution(0.0, 1.0) for name in names}
    start = dict(zip(names, found[0].point, strict=True))
    sampler = optuna.samplers.CmaEsSampler(x0=start, sigma0=0.2, seed=trial_seed(0, 0, "cma-es"))
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.add_trial(optuna.trial.create_trial(params=start, distributions=box, value=found[0].objective))
    for trial in found[1:]:
        asked = study.ask(box)
        assert as_point([asked.params[name] for name in names]) == trial.point
        study.tell(asked, trial.objective)
    # It learns: the last generation is nearer to the top than the first.
    values = [float(trial.objective or 0.0) for trial in found]
    assert sum(values[-8:]) > sum(values[1:9])


def test_cma_es_does_without_a_walk_whose_own_trial_failed(tmp_path: Path) -> None:
    def fragile(settings: Mapping[str, Setting], rival: GainsByTask | None) -> Outcome:
        if settings["mlp"].lam == 0.1:
            raise FloatingPointError("overflow in a product")
        return measure(settings, rival)

    plan = Plan(trials=5, seed=0, searcher="cma-es", reference=0.1)
    found = search(SPACE, fragile, Study.open(tmp_path / "log", {}), plan).trials
    assert [trial.state for trial in found] == ["complete", "failed", "complete", "complete", "complete"]
