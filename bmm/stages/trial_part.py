"""What a worker does of a search: measures one setting, and keeps what the next one needs as well.

A request is plain values and its answer follows from them alone, so that another worker may be asked the same. What
proposes and logs is the search stage (`bmm.stages.search`).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from bmm.assembly import Assembler
from bmm.prediction import StoredWeights
from bmm.search.outcome import Outcome
from bmm.search.rows import GainsByTask
from bmm.search.setting import Setting
from bmm.stages.assembling import assembler_of, module_groups
from bmm.stages.objective import Objective
from bmm.stages.request import Request, Work
from bmm.stages.setup import setup_of
from bmm.store import Store
from bmm.threads import one_thread


@dataclass(frozen=True)
class TrialRequest:
    """One setting to measure.

    Attributes:
        search: digest of everything but the setting; what a worker keeps, it keeps under it.
        request: that of the search stage.
        store: where artefacts are.
        settings: by group, as JSON.
        rival: by task, the gains of the rows of the trial to beat; None where there is none.
    """

    search: str
    request: dict[str, Any]
    store: str
    settings: dict[str, Any]
    rival: dict[str, list[float]] | None


_lock = threading.Lock()
_kept: dict[str, tuple[Objective, Assembler, ExitStack]] = {}
"""What is kept of a search: one model, so that a worker of several threads measures one setting at a time."""
_unwanted: set[str] = set()
"""Searches that ended while a setting was measured here."""


def trial_outcome(values: dict[str, Any]) -> dict[str, Any]:
    """Measure one setting; a `TrialRequest` as plain values in, an `Outcome` as plain values out."""
    asked = TrialRequest(**values)
    with _lock, one_thread():
        try:
            return _measured(asked)
        finally:
            for search in tuple(_unwanted):
                _unwanted.discard(search)
                _drop(search)


def _measured(asked: TrialRequest) -> dict[str, Any]:
    if asked.search not in _kept:
        # Of one search at a time: the factors of every map are large.
        for other in tuple(_kept):
            _drop(other)
        _kept[asked.search] = _prepared(Work(Store.open(asked.store)), Request.from_json(asked.request))
    objective, assembler, _ = _kept[asked.search]
    chosen = {group: Setting.from_json(value) for group, value in asked.settings.items()}
    rival = None if asked.rival is None else {task: np.asarray(rows) for task, rows in asked.rival.items()}
    outcome = objective.evaluate(assembler, chosen, rival)
    found = None if outcome.gains is None else {task: rows.tolist() for task, rows in outcome.gains.items()}
    return {**vars(outcome), "tasks": dict(outcome.tasks), "gains": found}


def forget(search: str) -> None:
    """Drop what this process keeps of a search, at once or when the setting is measured that is under way."""
    # A worker does this where it also answers its scheduler, so that it must not wait.
    if not _lock.acquire(blocking=False):
        _unwanted.add(search)
        return
    try:
        _drop(search)
    finally:
        _lock.release()


def _drop(search: str) -> None:
    kept = _kept.pop(search, None)
    if kept is not None:
        kept[2].close()


def as_outcome(values: Mapping[str, Any]) -> Outcome:
    """Return the outcome that a worker has answered."""
    found: GainsByTask | None = None
    if values["gains"] is not None:
        found = {task: np.asarray(rows, dtype=np.float64) for task, rows in values["gains"].items()}
    return Outcome(values["objective"], values["tasks"], values["variance"], values["seen"], found)


def _prepared(work: Work, request: Request) -> tuple[Objective, Assembler, ExitStack]:
    setup = setup_of(work, request)
    anchored = StoredWeights(work.read(request.inputs["anchor"]))
    groups = module_groups(setup, request.settings["search"]["per"])
    objective = Objective(work, request, setup, groups, anchored)
    with ExitStack() as stack:
        # Open for as long as settings are measured: other sums of Gram matrices ask for the experts' weights again.
        weights = stack.enter_context(setup.weights())
        return objective, assembler_of(work, request, setup, weights, anchored), stack.pop_all()
