"""What a worker keeps of a search is one model: settings are measured one at a time, and forgetting waits for none."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from bmm.search.outcome import Outcome
from bmm.stages import trial_part
from bmm.stages.trial_part import TrialRequest, forget, trial_outcome

REQUEST = {"stage": "search", "inputs": {}, "settings": {}, "where": {}}


class OneModel:
    """Measures a `λ` by what a model that it shares holds a moment later."""

    def __init__(self) -> None:
        self.held = 0.0
        self.closed = 0
        self.begun = threading.Event()
        self.may_end = threading.Event()
        self.may_end.set()
        self.threads: set[int] = set()

    def evaluate(self, _: Any, chosen: Any, rival: Any) -> Outcome:  # noqa: ARG002
        self.held = chosen["model"].lam
        self.threads.add(torch.get_num_threads())
        self.begun.set()
        self.may_end.wait(30)
        threading.Event().wait(0.02)
        return Outcome(self.held, {})


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Iterator[OneModel]:
    made = OneModel()

    def prepared(*_: Any) -> Any:
        stack = ExitStack()
        stack.callback(lambda: setattr(made, "closed", made.closed + 1))
        return made, None, stack

    monkeypatch.setattr(trial_part, "_prepared", prepared)
    yield made
    forget("search")


def asked(folder: Path, lam: float) -> dict[str, Any]:
    return vars(TrialRequest("search", REQUEST, str(folder), {"model": {"lambda": lam, "gamma": 1.0}}, None))


def test_a_worker_of_several_threads_measures_one_setting_at_a_time(tmp_path: Path, model: OneModel) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda lam: trial_outcome(asked(tmp_path, lam)), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))
    finally:
        torch.set_num_threads(before)
    assert [outcome["objective"] for outcome in found] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert model.threads == {1}


def test_a_search_that_ends_meanwhile_is_forgotten_after_the_setting_under_way(tmp_path: Path, model: OneModel) -> None:
    model.may_end.clear()
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(trial_outcome, asked(tmp_path, 1.0))
        assert model.begun.wait(30)
        forget("search")
        assert model.closed == 0
        model.may_end.set()
        assert found.result()["objective"] == 1.0
    assert model.closed == 1
    trial_outcome(asked(tmp_path, 2.0))
    forget("search")
    assert model.closed == 2
