"""Trials side by side: the same study whoever is quick, no worker idle for one straggler, nothing lost to a kill."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from killable import begun, ended

from bmm.errors import DataError
from bmm.search.outcome import Outcome
from bmm.search.plan import Plan
from bmm.search.rows import GainsByTask
from bmm.search.run import search
from bmm.search.setting import Setting
from bmm.search.settings import Searcher
from bmm.search.space import Space
from bmm.search.study import Study

SPACE = Space(("attention", "mlp"), (-4.0, 2.0), (0.5, 1.5))
TRIALS = 16


def measure(settings: Mapping[str, Setting], rival: GainsByTask | None = None) -> Outcome:
    value = -sum(abs(min(setting.lam, 50.0) - 0.3) + abs(setting.gamma - 1.1) for setting in settings.values())
    # Rows that are hard for every setting, and some that are a little harder for one than for another.
    odd = np.array([1.0, -1.0] * 12)
    rows = value + np.sin(np.arange(24.0)) + 0.05 * sum(setting.gamma for setting in settings.values()) * odd
    return Outcome(value, {"news": value}, gains={"news": rows})


class Slow:
    """`measure` with pauses, and how many were measured at the same time."""

    def __init__(self, pauses: list[float]) -> None:
        self._pauses = pauses
        self._lock = threading.Lock()
        self._now = 0
        self.most = 0
        self.begun = 0

    def __call__(self, settings: Mapping[str, Setting], rival: GainsByTask | None) -> Outcome:
        with self._lock:
            pause = self._pauses[self.begun % len(self._pauses)]
            self.begun += 1
            self._now += 1
            self.most = max(self.most, self._now)
        time.sleep(pause)
        with self._lock:
            self._now -= 1
        return measure(settings, rival)


@pytest.mark.parametrize("searcher", ["bayesian", "cma-es"])
def test_who_is_quick_decides_nothing(tmp_path: Path, searcher: Searcher) -> None:
    plan = Plan(trials=TRIALS, seed=0, parallel=3, searcher=searcher)
    found = []
    for place, pauses in enumerate(([0.0], [0.05, 0.0, 0.0, 0.1], [0.0, 0.02])):
        slow = Slow(pauses)
        study = Study.open(tmp_path / f"{place}.jsonl", {})
        found.append(search(SPACE, slow, study, plan).trials)
        assert slow.begun == TRIALS
    assert found[0] == found[1] == found[2]
    assert [trial.index for trial in found[0]] == list(range(TRIALS))


def test_a_straggler_does_not_hold_the_others_up(tmp_path: Path) -> None:
    gate = threading.Event()
    others: list[int] = []

    def evaluate(settings: Mapping[str, Setting], rival: GainsByTask | None) -> Outcome:
        if all(setting.lam == float("inf") for setting in settings.values()):
            # The anchor waits until two others have been measured beside it.
            assert gate.wait(60)
        else:
            others.append(1)
            if len(others) == 2:
                gate.set()
        return measure(settings)

    plan = Plan(trials=6, seed=0, parallel=2)
    assert len(search(SPACE, evaluate, Study.open(tmp_path / "log.jsonl", {}), plan).trials) == 6


def test_a_users_mistake_ends_the_search_and_keeps_what_is_finished(tmp_path: Path) -> None:
    begun: list[int] = []

    def evaluate(settings: Mapping[str, Setting], rival: GainsByTask | None) -> Outcome:
        begun.append(1)
        if len(begun) == 5:
            raise DataError("the split is empty")
        return measure(settings)

    study = Study.open(tmp_path / "log.jsonl", {})
    with pytest.raises(DataError):
        search(SPACE, evaluate, study, Plan(trials=TRIALS, seed=0, parallel=2))
    assert len(study.trials) >= 3


def test_pending_points_are_known_to_a_proposal(tmp_path: Path) -> None:
    """With three under way no two of them are the same, though all are proposed from one history."""
    study = Study.open(tmp_path / "log.jsonl", {})
    found = search(SPACE, measure, study, Plan(trials=24, seed=3, parallel=3)).trials
    assert len({trial.point for trial in found}) == len(found)
    assert sum(trial.origin == "bayesian" for trial in found) >= 10


@pytest.mark.slow
@pytest.mark.parametrize(("parallel", "most", "trials"), [(1, 20, 28), (3, 5, TRIALS)])
def test_a_search_killed_many_times_ends_like_an_uninterrupted_one(
    tmp_path: Path, parallel: int, most: int, trials: int
) -> None:
    plan = Plan(trials=trials, seed=0, parallel=parallel)
    whole = search(SPACE, measure, Study.open(tmp_path / "whole.jsonl", {}), plan)
    log = tmp_path / "killed.jsonl"
    draw = random.Random(parallel)
    kills = 0
    while kills < most:
        process = begun(_killed, log, 0.15, parallel, trials)
        try:
            # Somewhere in the search: what imports take does not count.
            while not log.exists() and process.is_alive():
                time.sleep(0.02)
            size = log.stat().st_size
            deadline = time.monotonic() + 60
            while log.stat().st_size <= size and process.is_alive() and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(draw.random() * 0.15)
            if not process.is_alive():
                break
            process.kill()
            process.join()
            assert process.exitcode == -signal.SIGKILL
            kills += 1
        finally:
            ended(process)
    assert kills >= most // 2
    asked = Slow([0.0])
    found = search(SPACE, asked, Study.open(log, {}), plan)
    assert found == whole
    # To the last byte, the rows with them; side by side they are logged as they finish.
    assert sorted(log.read_bytes().splitlines()) == sorted((tmp_path / "whole.jsonl").read_bytes().splitlines())
    # What was finished before the last kill was not measured again.
    assert asked.begun <= trials - kills + parallel * kills


def _killed(log: Path, seconds: float, parallel: int, trials: int) -> None:
    search(SPACE, Slow([seconds]), Study.open(log, {}), Plan(trials=trials, seed=0, parallel=parallel))
