"""The loop: resumes to the same study, never below the anchor, better than its first design."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from killable import begun, ended

from bmm.errors import ArtefactDamagedError, BMMError, ClusterError, DataError, KilledWorkersError, StoreAwayError
from bmm.progress import reporting
from bmm.search.outcome import Evaluate, Outcome
from bmm.search.plan import Plan
from bmm.search.rows import GainsByTask
from bmm.search.run import Found, search
from bmm.search.setting import Setting
from bmm.search.settings import Objective
from bmm.search.space import Space
from bmm.search.study import Study

SPACE = Space(("attention", "mlp-in", "mlp-out"), (-4.0, 2.0), (0.5, 1.5))
OPTIMUM = {"attention": (-1.0, 1.1), "mlp-in": (0.3, 0.9), "mlp-out": (-0.2, 1.2)}
IDENTITY = {"seed": 0}
TRIALS = 16


def measure(settings: Mapping[str, Setting], rival: GainsByTask | None = None) -> Outcome:
    """A smooth bump over six dimensions with its top, 1, at OPTIMUM."""
    cost = {}
    for group, (exponent, gamma) in OPTIMUM.items():
        lam = min(settings[group].lam, 100.0)
        cost[group] = 0.02 * (math.log10(lam) - exponent) ** 2 + (settings[group].gamma - gamma) ** 2
    tasks = {group: math.exp(-value) for group, value in cost.items()}
    return Outcome(math.exp(-sum(cost.values())), tasks)


class Counted:
    """`measure`, with what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Setting]] = []

    def __call__(self, settings: Mapping[str, Setting], rival: GainsByTask | None = None) -> Outcome:
        self.asked.append(dict(settings))
        return measure(settings, rival)


def planned(evaluate: Evaluate, study: Study, trials: int, seed: int = 0, **more: Any) -> Found:
    return search(SPACE, evaluate, study, Plan(trials=trials, seed=seed, **more))


def a_study(folder: Path, name: str = "study.jsonl") -> Study:
    return Study.open(folder / name, IDENTITY)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Study:
    study = a_study(tmp_path_factory.mktemp("uninterrupted"))
    planned(measure, study, TRIALS)
    return study


def test_the_trials_come_in_their_order(uninterrupted: Study) -> None:
    origins = [trial.origin for trial in uninterrupted.trials]
    assert origins == ["anchor"] + ["global"] * 9 + ["sobol"] * 3 + ["bayesian"] * 3
    assert uninterrupted.trials[0].settings == SPACE.anchor()
    for trial in uninterrupted.trials:
        assert trial.settings == SPACE.decode(trial.point)
        assert (trial.objective, trial.tasks) == (
            measure(trial.settings).objective,
            measure(trial.settings).tasks,
        )


def killed_search(log: Path, marker: Path, evaluation: int) -> None:
    """Search in a process of its own until evaluation number `evaluation`, and SIGKILL it there."""
    process = begun(_stuck_search, log, marker, evaluation)
    try:
        deadline = time.monotonic() + 240
        while not marker.exists() and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert process.is_alive()
        assert marker.exists()
    finally:
        ended(process)
    assert process.exitcode == -signal.SIGKILL


def test_a_search_killed_twice_ends_like_an_uninterrupted_one(tmp_path: Path, uninterrupted: Study) -> None:
    log = tmp_path / "study.jsonl"
    killed_search(log, tmp_path / "first", 4)
    assert len(a_study(tmp_path).trials) == 4
    killed_search(log, tmp_path / "second", 8)
    # A write that the kill tore: the line's beginning is on disk, its end is not.
    with log.open("ab") as handle:
        handle.write(b'{"checksum":"00')
    study = a_study(tmp_path)
    assert len(study.trials) == 12
    counted = Counted()
    best = planned(counted, study, TRIALS).best
    assert len(counted.asked) == TRIALS - 12
    assert best == uninterrupted.best
    assert log.read_bytes() == uninterrupted.path.read_bytes()


def test_a_finished_study_is_not_evaluated_again(uninterrupted: Study) -> None:
    counted = Counted()
    again = Study.open(uninterrupted.path, IDENTITY)
    assert planned(counted, again, TRIALS).best == uninterrupted.best
    shorter = planned(counted, again, 9).best
    assert counted.asked == []
    assert shorter == max(uninterrupted.trials[:9], key=lambda trial: trial.objective or 0)


def test_another_seed_makes_other_trials(tmp_path: Path, uninterrupted: Study) -> None:
    study = a_study(tmp_path)
    planned(measure, study, TRIALS, 1)
    settings = [trial.settings for trial in study.trials]
    same = [trial.settings for trial in uninterrupted.trials]
    assert settings[:10] == same[:10]
    assert all(one != other for one, other in zip(settings[10:], same[10:], strict=True))
    with pytest.raises(BMMError, match="another seed"):
        planned(measure, study, TRIALS)


def test_trials_of_other_groups_are_refused(tmp_path: Path) -> None:
    study = a_study(tmp_path)
    planned(measure, study, 1)
    other = Space(("model",), (-4.0, 2.0), (0.5, 1.5))
    with pytest.raises(BMMError, match="other module groups"):
        search(other, measure, study, Plan(trials=2, seed=0))


@pytest.mark.slow
def test_bayesian_trials_beat_the_first_design(tmp_path: Path) -> None:
    study = a_study(tmp_path)
    best = planned(measure, study, 24).best
    first = max(trial.objective or 0.0 for trial in study.trials if trial.origin != "bayesian")
    assert best.origin == "bayesian"
    assert best.objective is not None
    # Less than a third of the first design's distance to the top, 1, is left.
    assert 1 - best.objective < (1 - first) / 3


def test_failed_trials_are_logged_and_the_search_goes_on(tmp_path: Path) -> None:
    calls = Counted()

    def fragile(settings: Mapping[str, Setting], rival: GainsByTask | None) -> Outcome:
        outcome = calls(settings)
        match len(calls.asked):
            case 2:
                raise KilledWorkersError("it killed every worker")
            case 3:
                raise FloatingPointError("overflow in a product")
            case 9:
                return Outcome(math.nan, {})
            case 10:
                return Outcome(0.99, {"news": math.inf})
        return outcome

    study = a_study(tmp_path)
    best = planned(fragile, study, 12).best
    failed = {trial.index: trial.reason for trial in study.trials if trial.state == "failed"}
    assert failed == {
        1: "KilledWorkersError: it killed every worker",
        2: "FloatingPointError: overflow in a product",
        8: "the objective or a task's metric is not finite",
        9: "the objective or a task's metric is not finite",
    }
    assert all(study.trials[index].objective is None for index in failed)
    assert best.state == "complete"
    assert len(a_study(tmp_path).trials) == 12


TWO = {"news": 1.0, "mail": 1.0}


def rivals(folder: Path, **more: Any) -> list[str | None]:
    """For each trial, the place of the rival in the rows that it was given; the first three keep no floor of 0.7."""
    given: list[str | None] = []

    def evaluate(settings: Mapping[str, Setting], rival: GainsByTask | None) -> Outcome:
        place = len(given)
        given.append(None if rival is None else str(int(rival["news"][0])))
        news = {0: 0.5, 1: 0.6, 2: 0.6, 3: 0.8}.get(place, 0.6)
        tasks = {"news": news, "mail": 1.5 - news - 0.1 * (place == 3)}
        return Outcome(sum(tasks.values()) / 2 + 0.01 * place * (place < 3), tasks, gains={"news": np.full(2, place)})

    planned(evaluate, a_study(folder), 7, experts=TWO, **more)
    return given


def test_only_a_trial_that_keeps_the_floors_may_stop_another(tmp_path: Path) -> None:
    assert rivals(tmp_path / "plain", racing=True) == [None, "0", "1", "2", "2", "2", "2"]
    assert rivals(tmp_path / "floors", racing=True, floors={"news": 0.7}) == [None] * 4 + ["3"] * 3
    assert rivals(tmp_path / "worst", racing=True, worst_task=True) == [None] * 7
    assert rivals(tmp_path / "unraced") == [None] * 7


def test_only_a_trial_that_keeps_as_much_as_the_anchor_may_stop_another(tmp_path: Path) -> None:
    given: list[str | None] = []

    def evaluate(settings: Mapping[str, Setting], rival: GainsByTask | None) -> Outcome:
        place = len(given)
        given.append(None if rival is None else str(int(rival["news"][0])))
        # Each is better by the objective, all but one are worse than the anchor by the metric.
        news = {0: 0.8, 2: 0.8}.get(place, 0.7)
        return Outcome(-1 + 0.01 * place, {"news": news}, gains={"news": np.full(2, place)})

    found = planned(evaluate, a_study(tmp_path), 5, experts={"news": 1.0}, racing=True)
    assert given == [None, "0", "0", "2", "2"]
    assert found.best.index == 2


def test_failed_trials_do_not_disturb_a_search_with_floors(tmp_path: Path) -> None:
    calls = Counted()

    def fragile(settings: Mapping[str, Setting], rival: GainsByTask | None) -> Outcome:
        outcome = calls(settings)
        if len(calls.asked) == 3:
            raise FloatingPointError("overflow in a product")
        return outcome

    floors = {"attention": 0.5}
    found = planned(fragile, a_study(tmp_path), 12, experts=dict.fromkeys(OPTIMUM, 1.0), floors=floors)
    assert [trial.state for trial in found.trials].count("failed") == 1
    assert len(found.trials) == 12


def test_a_users_mistake_the_machines_and_a_bug_are_raised(tmp_path: Path) -> None:
    study = a_study(tmp_path)
    planned(measure, study, 2)
    for error in (
        DataError("the split is empty"),
        ClusterError("no worker left"),
        StoreAwayError("the disk is not mounted"),
        ArtefactDamagedError("a byte is another"),
        KeyError("bug"),
    ):

        def broken(settings: Mapping[str, Setting], rival: GainsByTask | None, error: Exception = error) -> Outcome:
            raise error

        with pytest.raises(type(error)):
            planned(broken, study, 4)
    assert len(a_study(tmp_path).trials) == 2


@pytest.mark.parametrize("outcome", [KilledWorkersError("it killed every worker"), Outcome(math.nan, {})])
def test_without_the_anchor_there_is_no_search(tmp_path: Path, outcome: Exception | Outcome) -> None:
    def broken(settings: Mapping[str, Setting], rival: GainsByTask | None) -> Outcome:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    study = a_study(tmp_path)
    with pytest.raises(BMMError, match="anchor could not be evaluated"):
        planned(broken, study, 5)
    # The fault may have been the machine's: the next run tries again.
    assert planned(measure, study, 1).best.index == 0


def test_the_result_is_never_below_the_anchor(tmp_path: Path) -> None:
    def only_the_anchor(settings: Mapping[str, Setting], rival: GainsByTask | None) -> Outcome:
        return Outcome(float(all(math.isinf(setting.lam) for setting in settings.values())), {})

    assert planned(only_the_anchor, a_study(tmp_path), 11).best.settings == SPACE.anchor()


def test_equal_objectives_go_to_the_earliest(tmp_path: Path) -> None:
    best = planned(lambda *_: Outcome(0.5, {}), a_study(tmp_path), 11).best
    assert best.index == 0


def test_identical_settings_are_evaluated_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    middle = SPACE.encode(SPACE.global_line(1)[0])
    monkeypatch.setattr("bmm.search.run.propose", lambda *_: ("sobol", middle))
    counted = Counted()
    study = a_study(tmp_path)
    planned(counted, study, 10)
    assert len(counted.asked) == 8  # the anchor and the line's seven, of which one is the middle
    assert study.trials[1].settings == study.trials[8].settings == study.trials[9].settings
    assert study.trials[8].objective == study.trials[1].objective
    assert study.trials[8].tasks == study.trials[1].tasks


def test_no_trials_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BMMError, match="at least one trial"):
        planned(measure, a_study(tmp_path), 0)


@pytest.mark.parametrize(
    ("objective", "said"), [("share-of-expert", "90.3 % of the experts"), ("nll", "−0.647 nats a row")]
)
def test_progress_counts_every_trial_and_names_the_best(tmp_path: Path, objective: Objective, said: str) -> None:
    class Recorder:
        """One bar that remembers what it was told."""

        def __init__(self) -> None:
            self.steps, self.texts, self.total = 0.0, [""], 0.0

        def start(self, text: str, total: float, unit: str = "") -> Recorder:  # noqa: ARG002
            self.texts, self.total = [text], total
            return self

        def tell(self, text: str) -> None:
            raise AssertionError(text)

        def finish(self, bar: object) -> None:
            assert bar is self

        def advance(self, steps: float = 1.0) -> None:
            self.steps += steps

        def describe(self, text: str) -> None:
            self.texts.append(text)

    values: dict[Objective, float] = {"share-of-expert": 0.9034, "nll": -0.6467}

    def constant(settings: Mapping[str, Setting], rival: GainsByTask | None = None) -> Outcome:
        return replace(measure(settings, rival), objective=values[objective])

    planned(constant, a_study(tmp_path), 2)
    recorder = Recorder()
    context: AbstractContextManager[None] = reporting(recorder)
    with context:
        planned(constant, a_study(tmp_path), 4, objective=objective)
    assert (recorder.texts[0], recorder.steps, recorder.total) == ("searching", 4, 4)
    assert recorder.texts[-1] == f"searching, best {said} at trial 0"


def test_importing_the_search_does_not_import_torch() -> None:
    code = "import sys, bmm.search.run; sys.exit('torch' in sys.modules or 'botorch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def _stuck_search(log: Path, marker: Path, evaluation: int) -> None:
    """Search for good, and after so many evaluations stop within the next one and say so in `marker`."""
    count = 0

    def stuck(settings: Mapping[str, Setting], rival: GainsByTask | None) -> Outcome:
        nonlocal count
        if count == evaluation:
            marker.touch()
            while True:
                time.sleep(60)
        count += 1
        return measure(settings)

    planned(stuck, Study.open(log, IDENTITY), TRIALS)
