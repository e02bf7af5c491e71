"""The outer loop: propose, evaluate, log, until the plan is fulfilled; then the trial to publish.

How a setting is turned into a model and measured is the caller's `evaluate`; which setting comes next is
`bmm.search.propose`; how a trial is kept is `bmm.search.study`. Trial 0 is the anchor, so the result is
never worse than the anchor on what `evaluate` measures.

Several trials may be under way at once. Trial `i` is proposed as soon as all trials before `i − lag` are finished
(`Plan.lag`), knowing their outcomes and, as pending points, the settings of those between: so which trials there are
does not depend on which worker is quick, and a study that is killed goes on to the same end.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Literal

from bmm.errors import BMMError
from bmm.progress import Bar, progress
from bmm.search.outcome import Evaluate, Outcome, as_trial
from bmm.search.plan import Plan, trial_seed
from bmm.search.propose import Designed, initial_design, propose
from bmm.search.recommend import recommended
from bmm.search.rows import GainsByTask
from bmm.search.space import Space
from bmm.search.study import Study
from bmm.search.trial import Trial, best_of

Ended = Literal["trials", "evaluations", "minutes"]


@dataclass(frozen=True)
class Found:
    """A finished search: the trial to publish, all trials by index, and which budget ended it."""

    best: Trial
    trials: tuple[Trial, ...]
    ended: Ended


def search(
    space: Space,
    evaluate: Evaluate,
    study: Study,
    plan: Plan,
    clock: Callable[[], float] = time.monotonic,
) -> Found:
    """Run the study up to what the plan allows; return the trial to publish (`bmm.search.recommend`) and the others.

    Trials that the study already holds are not evaluated again, nor are settings equal to those of an earlier trial:
    they take over its outcome. When `evaluate` raises another `BMMError` or a `FloatingPointError`, or finds a number
    that is not finite, the trial is logged as failed.

    Args:
        space: what is searched.
        evaluate: measures a setting; called from several threads where several trials are under way.
        study: the log.
        plan: budgets, searcher, seed.
        clock: seconds, for the budget in minutes.

    Raises:
        UserError, ClusterError, StoreAwayError, ArtefactDamagedError: as `evaluate` raised it; it is not a property of
            one setting, but for a `KilledWorkersError`.
        BMMError: the anchor itself could not be evaluated (nothing is logged, so the next run tries again),
            or the study's trials are of another space or seed.
    """
    if plan.trials < 1:
        raise BMMError(f"a search needs at least one trial, the anchor, not {plan.trials}")
    for trial in study.trials:
        if set(trial.settings) != set(space.groups) or trial.seed != trial_seed(plan.seed, trial.index):
            raise BMMError(f"the study {study.path} was made with other module groups or another seed")
    with progress("searching", plan.trials) as bar:
        return _Search(space, evaluate, study, plan, clock, bar).run()


class _Search:
    def __init__(
        self, space: Space, evaluate: Evaluate, study: Study, plan: Plan, clock: Callable[[], float], bar: Bar
    ) -> None:
        self._space = space
        self._evaluate = evaluate
        self._study = study
        self._plan = plan
        self._clock = clock
        self._bar = bar
        self._design = initial_design(space, plan)
        self._proposals: dict[int, Designed] = {}
        self._flying: dict[int, Future[Outcome]] = {}
        self._next = 0
        self._evaluated = 0
        self._ended: Ended | None = None
        self._end = None if plan.minutes is None else clock() + 60 * plan.minutes

    def run(self) -> Found:
        if self._plan.parallel == 1:
            while self._begin(self._here):
                self._land()
        else:
            pool = ThreadPoolExecutor(self._plan.parallel, thread_name_prefix="trial")
            try:
                while self._begin(pool.submit):
                    self._look_ahead()
                    self._land()
            finally:
                # Nobody waits for trials that nobody will log.
                pool.shutdown(wait=False, cancel_futures=True)
        trials = tuple(trial for trial in self._study.trials if trial.index < self._next)
        best = best_of(trials)
        if best is None:
            raise BMMError(f"no trial of the study {self._study.path} is complete, not even the anchor")
        return Found(recommended(self._space, trials, self._plan) or best, trials, self._ended or "trials")

    def _begin(self, submit: Callable[..., Future[Outcome]]) -> bool:
        """Begin as many trials as there is room for; say whether any is under way."""
        while len(self._flying) < self._plan.parallel and self._next < self._plan.trials and self._ended is None:
            index = self._next
            if index not in self._study:
                if self._end is not None and self._clock() >= self._end and index:
                    self._ended = "minutes"
                    break
                if not self._ready(index):
                    break
            settings = self._proposal(index)[2]
            twin = next((other for other in range(index) if self._proposal(other)[2] == settings), None)
            if twin is None:
                if self._plan.evaluations is not None and self._evaluated >= self._plan.evaluations:
                    self._ended = "evaluations"
                    break
                if index not in self._study:
                    self._flying[index] = submit(self._evaluate, settings, self._rival(index))
                self._evaluated += 1
            elif index not in self._study:
                if twin not in self._study:
                    break
                self._study.append(self._as(index, self._study[twin]))
            self._next += 1
            if index in self._study:
                self._told()
        return bool(self._flying)

    def _land(self) -> None:
        """Wait for what is finished first, and log it."""
        wait(self._flying.values(), return_when=FIRST_COMPLETED)
        for index, future in sorted(self._flying.items()):
            if not future.done():
                continue
            del self._flying[index]
            self._study.append(as_trial(future, self._bare(index)))
            self._told()

    def _look_ahead(self) -> None:
        """Propose while workers work, so that none waits for it."""
        if self._next < self._plan.trials and self._next not in self._study and self._ready(self._next):
            self._proposal(self._next)

    def _here(self, function: Evaluate, *arguments: object) -> Future[Outcome]:
        future: Future[Outcome] = Future()
        try:
            future.set_result(function(*arguments))  # type: ignore[arg-type]
        except Exception as error:
            future.set_exception(error)
        return future

    def _known(self, index: int) -> range:
        """Return the trials that must be finished before one is proposed: of any proposal the anchor at least."""
        return range(max(index - self._plan.lag, int(index >= len(self._design))))

    def _ready(self, index: int) -> bool:
        return all(other in self._study for other in self._known(index))

    def _history(self, index: int) -> list[Trial]:
        return [self._study[other] for other in self._known(index)]

    def _proposal(self, index: int) -> Designed:
        """Return what is tried at an index, proposed now if need be."""
        if index in self._study:
            trial = self._study[index]
            return trial.origin, trial.point, trial.settings
        if index not in self._proposals:
            if index < len(self._design):
                self._proposals[index] = self._design[index]
            else:
                before = {other: self._proposal(other)[:2] for other in range(index)}
                origin, point = propose(self._space, self._history(index), before, self._plan, index)
                self._proposals[index] = (origin, point, self._space.decode(point))
        return self._proposals[index]

    def _rival(self, index: int) -> GainsByTask | None:
        """Return the rows of the trial that this one must beat."""
        rival = self._plan.rival_of(self._history(index))
        return None if rival is None else rival.gains

    def _bare(self, index: int) -> Trial:
        origin, point, settings = self._proposal(index)
        return Trial(index, origin, settings, None, {}, point, "failed", None, trial_seed(self._plan.seed, index))

    def _as(self, index: int, twin: Trial) -> Trial:
        bare = self._bare(index)
        return replace(twin, index=index, origin=bare.origin, point=bare.point, seed=bare.seed)

    def _told(self) -> None:
        best = best_of(self._study.trials)
        if best is not None and best.objective is not None:
            self._bar.describe(f"searching, best {self._in_words(best.objective)} at trial {best.index}")
        self._bar.advance()

    def _in_words(self, objective: float) -> str:
        if self._plan.objective == "share-of-expert":
            return f"{100 * objective:.1f} % of the experts"
        return f"{objective:.3f} nats a row".replace("-", "−")
