"""What a search is to do, apart from its space: how many trials, who proposes them, and what counts as good."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from bmm.search.settings import ALL_TASKS, Objective, Searcher, SearchSettings
from bmm.search.trial import Trial, best_of

PROPOSALS = 3
"""Version of Bayesian proposals (`bmm.search.propose`): with another one their studies begin anew."""
RACES = 2
"""Version of races (`Plan.rival_of`) where tasks have floors: with another one such studies begin anew."""
ANCHOR_TRIAL = 2
"""Version of the anchor's trial where a walk has several rounds: with another one such studies begin anew."""

ELECTION = 2
"""Version of what may be published, and so stop others, where the objective is not the tasks' metric: with another one
such studies begin anew."""

# Where the objective is the mean share itself, both say the same, but for the order of their sums.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Plan:
    """The orders of one search.

    Attributes:
        trials: how many there may be.
        seed: of every random draw.
        searcher: what proposes.
        objective: what counts as good.
        parallel: trials under way at the same time.
        evaluations: how many of the trials may run the model; None for no limit.
        minutes: after how many none begins; None for no limit.
        reference: the `λ` that a walk through the network went on with, if it was one for all maps.
        preferred: whether the setting with that `λ` is published where it is about as good as the best.
        noise: the objective's variance over draws of the rows, of a model about as good as the experts, if known.
        experts: each task's metric of its expert.
        floors: share of its expert's metric that a task must keep.
        worst_task: propose for the least share of any task too.
        racing: let the evaluation know the best trial before, so that it may stop one that cannot win.
    """

    trials: int
    seed: int
    searcher: Searcher = "bayesian"
    objective: Objective = "share-of-expert"
    parallel: int = 1
    evaluations: int | None = None
    minutes: float | None = None
    reference: float | None = None
    preferred: bool = True
    noise: float | None = None
    experts: Mapping[str, float] = field(default_factory=dict)
    floors: Mapping[str, float] = field(default_factory=dict)
    worst_task: bool = False
    racing: bool = False

    @classmethod
    def of(
        cls, settings: SearchSettings, experts: Mapping[str, float], noise: float | None, reference: float | None
    ) -> Plan:
        """Return the plan that a recipe asks for."""
        return cls(
            trials=settings.trials,
            seed=settings.seed,
            searcher=settings.searcher,
            objective=settings.objective,
            parallel=settings.parallel,
            evaluations=settings.evaluations,
            minutes=settings.minutes,
            reference=reference,
            # Where each trial walks with its own, each is exact.
            preferred=settings.walk == "once",
            noise=noise,
            experts=dict(experts),
            floors=floors_by_task(settings.floors, tuple(experts)),
            worst_task=settings.also == "worst-task",
            racing=settings.racing,
        )

    @property
    def lag(self) -> int:
        """How many trials before one its proposal does not wait for.

        As many as are evaluated side by side: so the next is at hand when a worker becomes free, one straggler holds
        nobody up, and what is proposed does not depend on who finishes first.
        """
        return self.parallel if self.parallel > 1 else 0

    def shares(self, trial: Trial) -> dict[str, float]:
        """Return each task's share of its expert's metric; 1 where the expert has nothing that one could share."""
        return {task: trial.tasks[task] / expert if expert > 0 else 1.0 for task, expert in self.experts.items()}

    def mean(self, trial: Trial) -> float:
        """Return the mean share of all tasks; 1 where no expert's metric is known."""
        return fmean(self.shares(trial).values()) if self.experts else 1.0

    def harmless(self, trial: Trial, anchor: Trial) -> bool:
        """Say whether a trial keeps as much of the experts as the anchor by the tasks' metric."""
        return self.mean(trial) >= self.mean(anchor) - _ROUNDING

    def worst(self, trial: Trial) -> float:
        """Return the least share of any task."""
        return min(self.shares(trial).values())

    def shortfall(self, trial: Trial) -> float:
        """Return by how much the tasks miss their floors, in sum; 0 where all are kept."""
        if not self.floors:
            return 0.0
        shares = self.shares(trial)
        return sum(max(0.0, floor - shares[task]) for task, floor in self.floors.items())

    def rival_of(self, history: Sequence[Trial]) -> Trial | None:
        """Return the trial that the next one must beat, or None where it is measured to its end.

        A race asks for the objective alone. So only a trial that keeps the floors, or, without any, as much of the
        experts as the anchor may stop another, and nothing is stopped that may be wanted for its worst task.
        """
        if not self.racing or self.worst_task:
            return None
        complete = [trial for trial in history if trial.state == "complete"]
        if self.floors:
            return best_of([trial for trial in complete if not self.shortfall(trial)])
        return best_of([trial for trial in complete if self.harmless(trial, complete[0])])


def floors_by_task(floors: Mapping[str, float], tasks: tuple[str, ...]) -> dict[str, float]:
    """Return the floor of every task that has one."""
    return {
        task: floors.get(task, floors.get(ALL_TASKS, 0.0)) for task in tasks if task in floors or ALL_TASKS in floors
    }


def trial_seed(seed: int, index: int, purpose: str = "trial") -> int:
    """Return the 31-bit seed of one trial of a study; different purposes get independent ones."""
    digest = hashlib.sha256(f"{purpose}:{seed}:{index}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
