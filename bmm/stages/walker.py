"""One layer of a walk: the tasks' shares are asked for moments, which are summed in the recipe's order and solved.

The shares answer in this process, or in Dask workers where there are several (`bmm.stages.walk_part`). Which layers are
walked through, and which of them the store has already, is `bmm.stages.propagation`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress

import torch
from safetensors.torch import save_file

from bmm.cluster.connection import Cluster, workers
from bmm.cluster.run import run_all
from bmm.cluster.settings import ClusterSettings
from bmm.errors import BMMError
from bmm.memory import give_back
from bmm.modules.linear import LinearMap
from bmm.modules.units import Unit
from bmm.progress import Bar
from bmm.regression.held_out import best_lambda
from bmm.regression.moments import Moments, total, trusted
from bmm.regression.posterior import Spectrum
from bmm.regression.ridge import Ridge, serves
from bmm.regression.settings import DEFAULT_LAMBDA, RegressionSettings
from bmm.stages.request import Request, Work
from bmm.stages.setup import Setup
from bmm.stages.walk_part import SOLUTIONS, PartRequest, forget, part_moments
from bmm.store import Draft, Reference, artefact_key

WALK_VERSION = 7
MOMENTS = "moments.safetensors"
_OUTPUTS = 8192
"""Of a map, solved at a time; more than any layer's, so that only output heads are taken apart."""


class Walker:
    """Asks the shares of a walk for moments, and solves; workers start when the first unit has to be computed."""

    def __init__(
        self,
        work: Work,
        request: Request,
        setup: Setup,
        prior: Callable[[str], torch.Tensor],
        before: Sequence[Reference],
        identity: str,
        strengths: Mapping[str, float] | None,
        stack: ExitStack,
        bar: Bar,
    ) -> None:
        self._strengths = strengths
        self._work = work
        self._request = request
        self._prior = prior
        self._before = before
        self.done: list[Reference] = []
        self._identity = identity
        self._lambda = request.settings["regression"]["walk_lambda"]
        self._cluster = ClusterSettings.model_validate(request.where["cluster"])
        self._experts = len(setup.experts)
        settings = RegressionSettings.model_validate(request.settings["regression"])
        self._weights = settings.weights([expert.name for expert in setup.experts])
        self._stack = stack
        self._bar = bar
        self._workers: Cluster | None = None
        self._shares: list[tuple[int, ...]] = []

    def solve_unit(self, draft: Draft, unit: Unit, *, moments: bool) -> None:
        """Solve the groups of one unit in order, and write solutions and, if asked for, moments."""
        self._start()
        kept: list[Reference] = []
        try:
            self._solve_unit(draft, unit, kept, moments=moments)
        finally:
            for reference in kept:
                # A store that cannot be reached any more says so elsewhere, and prunes what is left.
                with suppress(BMMError):
                    self._work.store.discard(reference.kind, reference.key)

    def _solve_unit(self, draft: Draft, unit: Unit, kept: list[Reference], *, moments: bool) -> None:
        tensors: dict[str, torch.Tensor] = {}
        solutions: dict[str, torch.Tensor] = {}
        lambdas: dict[str, float | None] = {}
        conditions: dict[str, float | None] = {}
        anchored: list[str] = []
        rows: dict[str, tuple[int, ...]] = {}
        for group in unit.groups:
            parts = self._ask(unit, group, kept)
            found = {}
            everything, *folds = (trusted(total(fold, self._weights), unit.groups[group]) for fold in parts)
            where = f"the input of {group}"
            asked = {map_.module: self._strength(map_.module) for map_ in unit.groups[group]}
            finite = {lam for lam in asked.values() if not math.isinf(lam)}
            solver: Ridge | Spectrum | None = None
            if not folds and len(finite) == 1 and serves(len(everything.gram), one := min(finite)):
                solver = Ridge(everything.gram, one, where=where)
            elif folds or finite:
                solver = everything.spectrum(where)
            for map_ in unit.groups[group]:
                anchor = map_.matrix(self._prior)
                lam = asked[map_.module] if not folds else _chosen(folds, map_, anchor)
                lambdas[map_.module] = None if math.isinf(lam) else lam
                found[map_.module], condition = _solution(solver, everything, map_.module, anchor, lam)
                conditions[map_.module] = condition if math.isfinite(condition) else None
                if solver is not None and solver.trace == 0:
                    anchored.append(map_.module)
            kept.append(self._keep(unit, group, found))
            solutions |= found
            if moments:
                tensors |= {f"{group}:{name}": tensor for name, tensor in everything.tensors().items()}
            rows[group] = everything.rows
            # The next group's sizes are others.
            freed = everything.nbytes
            del parts, everything, folds, solver, found
            give_back(freed)
        if moments:
            save_file(tensors, draft.path / MOMENTS)
        save_file(solutions, draft.path / SOLUTIONS)
        said = {"rows": rows, "lambdas": lambdas, "conditions": conditions, "anchored": anchored}
        draft.write_json("unit.json", {"name": unit.name, **said})

    def _strength(self, module: str) -> float:
        """Return the `λ` of a map; of one whose rows held out choose it, any."""
        if self._strengths is not None:
            return self._strengths[module]
        return self._lambda if isinstance(self._lambda, float | int) else DEFAULT_LAMBDA

    def _keep(self, unit: Unit, group: str, found: Mapping[str, torch.Tensor]) -> Reference:
        """Put a group's solutions where every worker finds them, for as long as its unit is in work."""
        place = {"walk": self._identity, "unit": unit.name, "group": group}
        key = artefact_key("walk-group", WALK_VERSION, place, {})

        def make(draft: Draft) -> None:
            save_file(dict(found), draft.path / SOLUTIONS)

        # Anew, whatever a killed run has left: these are what the sum of this run goes with.
        reference, _ = self._work.store.obtain("walk-group", key, make, replace=True)
        return reference

    def _start(self) -> None:
        if self._shares:
            return
        count = 1
        if not self._cluster.local or min(self._cluster.workers, self._experts) > 1:
            self._workers = self._stack.enter_context(workers(self._cluster))
            count = min(self._workers.count(), self._experts)
            self._stack.callback(self._workers.everywhere, forget, self._identity)
        else:
            self._stack.callback(forget, self._identity)
        bounds = [self._experts * share // count for share in range(count + 1)]
        self._shares = [tuple(range(low, high)) for low, high in itertools.pairwise(bounds)]

    def _ask(self, unit: Unit, group: str, solved: Sequence[Reference]) -> list[list[Moments]]:
        """Return the tasks' moments of one group in the recipe's order: of all rows, then of each fold."""
        requests = [
            vars(
                PartRequest(
                    walk=self._identity,
                    request=self._request.to_json(),
                    store=self._work.store.location,
                    tasks=share,
                    before=tuple(reference.to_json() for reference in self._before),
                    done=tuple(reference.to_json() for reference in self.done),
                    unit=unit.name,
                    solved=tuple(reference.to_json() for reference in solved),
                    group=group,
                    held_out=self._lambda == "held-out",
                )
            )
            for share in self._shares
        ]
        answers: Sequence[list[tuple[Moments, ...]]]
        if self._workers is None:
            answers = [part_moments(values) for values in requests]
        else:
            # Each share where its activations are, for as long as that worker lives.
            answers = run_all(self._workers, part_moments, requests, at_home=True)
        self._bar.advance(self._experts)
        tasks = [moments for answer in answers for moments in answer]
        return [list(fold) for fold in zip(*tasks, strict=True)]


def _solution(
    solver: Ridge | Spectrum | None, moments: Moments, module: str, anchor: torch.Tensor, lam: float
) -> tuple[torch.Tensor, float]:
    """Return one map's posterior mean, float32, and the condition number of what was inverted for it.

    Each output is solved on its own, so those of an output head are solved some at a time.
    """
    if solver is None or math.isinf(lam):
        return anchor.to(torch.float32).contiguous(), 1.0
    found = torch.empty(anchor.shape, dtype=torch.float32)
    for start in range(0, len(anchor), _OUTPUTS):
        rows = slice(start, start + _OUTPUTS)
        own, part = anchor[rows], moments.of_rows(module, rows)
        if isinstance(solver, Ridge):
            found[rows], condition = solver.mean(own, part.pull(module, own)), solver.condition
        else:
            posterior = part.posterior(solver, module, own)
            found[rows], condition = posterior.mean(lam), posterior.condition(lam)
    return found, condition


def _chosen(folds: Sequence[Moments], map_: LinearMap, anchor: torch.Tensor) -> float:
    """Return the `λ` that errs least on the rows held out."""
    fit, held_out = folds
    if not any(fit.rows) or not any(held_out.rows):
        return DEFAULT_LAMBDA
    return best_lambda(fit, held_out, fit.spectrum(f"the input of {map_.input_group}"), map_.module, anchor)
