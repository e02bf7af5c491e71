"""Which point is tried next: the first design, then Bayesian optimisation in a trust region.

Pure functions of the space, the logged trials and a seed; nothing is evaluated and nothing is written here.
The same history gives the same proposal, also after it was read back from the log, in another process, on
any number of cores.

The design. The anchor comes first, then a line of one λ for all groups with `γ = 1`: most of what there is
to win lies on that line, and random points of the whole box are worse than its best (measured; see the
project's notes on the outer level). So everything after it is drawn near the best trial so far, in a trust
region after TuRBO (Eriksson et al., NeurIPS 2019): a box around that trial, first a few scrambled Sobol
points in it, then the maximiser of the expected improvement (qLogNEI, Ament et al., NeurIPS 2023) of a
Gaussian process fitted to all trials. The box doubles after two improvements in a row and halves after four
proposals in a row without one; once it is very small it starts over at its first length. A box that would
stick out of the cube is moved inside, so the anchor at the end of every λ axis still has a full
neighbourhood. Unlike TuRBO the box is the same length along each axis: with some twenty trials the length
scales are too uncertain to shape it.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from bmm.errors import BMMError
from bmm.search.space import Point, Setting, Space
from bmm.search.study import Origin, Trial, best_of
from bmm.threads import one_thread

FIRST_LENGTH = 0.4
LARGEST_LENGTH = 0.8
SMALLEST_LENGTH = 0.05
SUCCESSES_TO_GROW = 2
FAILURES_TO_SHRINK = 4

_LINE_POINTS = 7
_LINE_TRIALS = 24
_FIT_ATTEMPTS = 2
_DRAWS = 8
_RESTARTS = 4
_RAW_SAMPLES = 128
_MONTE_CARLO_SAMPLES = 64
_FIT_ITERATIONS = 50
_ACQUISITION_ITERATIONS = 50


@dataclass(frozen=True)
class TrustRegion:
    """A box of the unit cube: its lower corner, and one edge length for all axes."""

    lower: Point
    length: float

    @property
    def upper(self) -> Point:
        """The corner opposite `lower`."""
        return tuple(min(value + self.length, 1.0) for value in self.lower)

    def at(self, place: Sequence[float]) -> Point:
        """Return the cube's point at `place`, given as shares of the box's edges."""
        return _point(low + share * self.length for low, share in zip(self.lower, place, strict=True))


def trial_seed(seed: int, index: int, purpose: str = "trial") -> int:
    """Return the 31-bit seed of one trial of a study; different purposes get independent ones."""
    digest = hashlib.sha256(f"{purpose}:{seed}:{index}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def initial_design(
    space: Space, trials: int, reference: float | None = None
) -> list[tuple[Origin, Point, dict[str, Setting]]]:
    """Return the trials that need no history: the anchor, the `reference` for all groups, then the global-λ line.

    The line has 7 points when there are at least 24 trials, and fewer, up to half of them, when there are
    fewer. The local Sobol points that end the first design depend on the best of these: `propose` draws
    them.
    """
    line = _LINE_POINTS if trials >= _LINE_TRIALS else min(_LINE_POINTS - 1, trials // 2)
    design: list[tuple[Origin, Point]] = [("anchor", space.anchor_point())]
    if reference is not None and (point := space.plain_point(reference)) is not None:
        design.append(("global", point))
    design += [("global", point) for point in space.global_line(line)]
    return [(origin, point, space.decode(point)) for origin, point in design[:trials]]


def sobol_points(space: Space) -> int:
    """Return how many Sobol points come before the first Gaussian process: half the dimensions, 2 to 5."""
    return max(2, min(5, space.dimensions // 2))


def trust_region(history: Sequence[Trial]) -> TrustRegion:
    """Return the box around the best complete trial, its length replayed from the history.

    Raises:
        BMMError: no trial is complete.
    """
    best = best_of(tuple(history))
    if best is None:
        raise BMMError("no trial of the search is complete, so there is no best setting to search around")
    length = FIRST_LENGTH
    highest = float("-inf")
    successes = failures = 0
    for trial in history:
        objective = float("-inf") if trial.objective is None else trial.objective
        improved = objective > highest
        highest = max(highest, objective)
        if trial.origin != "bayesian":
            continue
        successes, failures = (successes + 1, 0) if improved else (0, failures + 1)
        if successes == SUCCESSES_TO_GROW:
            length, successes = min(2 * length, LARGEST_LENGTH), 0
        elif failures == FAILURES_TO_SHRINK:
            length, failures = length / 2, 0
            if length < SMALLEST_LENGTH:
                length = FIRST_LENGTH
    lower = tuple(min(max(value - length / 2, 0.0), 1.0 - length) for value in best.point)
    return TrustRegion(lower, length)


def propose(
    space: Space, history: Sequence[Trial], seed: int, index: int, noise: float | None = None
) -> tuple[Origin, Point]:
    """Return the next point to try, a pure function of `history`, the trials with an index below `index`.

    `noise` is the objective's variance where it is known (for an accuracy p of n rows about `p (1 − p) /
    n`); without it the Gaussian process infers one. When the numbers fail (a covariance that is not
    positive definite, a fit that does not converge) or the proposal was tried before, a seeded Sobol point
    of the same box takes its place.

    Raises:
        BMMError: no trial of the history is complete.
    """
    region = trust_region(history)
    drawn = sum(trial.origin == "sobol" for trial in history)
    tried = [trial.settings for trial in history]
    if drawn >= sobol_points(space):
        for attempt in range(_FIT_ATTEMPTS):
            point = _bayesian(history, region, trial_seed(seed, index, f"bayesian {attempt}"), noise)
            if point is not None and space.decode(point) not in tried:
                return "bayesian", point
    draws = [region.at(place) for place in _sobol(space.dimensions, trial_seed(seed, 0, "sobol"), drawn)]
    return "sobol", next((point for point in draws if space.decode(point) not in tried), draws[-1])


def _bayesian(history: Sequence[Trial], region: TrustRegion, seed: int, noise: float | None) -> Point | None:
    """Return the maximiser of the acquisition function inside `region`, or None when the numbers fail."""
    import torch
    from botorch.exceptions import BotorchError, ModelFittingError

    complete = [trial.objective for trial in history if trial.objective is not None]
    # A failed trial counts as bad as the worst complete one: the model must learn to stay away from it.
    objectives = [min(complete) if trial.objective is None else trial.objective for trial in history]
    points = torch.tensor([trial.point for trial in history], dtype=torch.float64)
    outcomes = torch.tensor(objectives, dtype=torch.float64).unsqueeze(-1)
    bounds = torch.tensor([region.lower, region.upper], dtype=torch.float64)
    # A covariance that is not positive definite and a NaN within one are RuntimeErrors.
    numerical = (BotorchError, ModelFittingError, ArithmeticError, RuntimeError, ValueError)
    try:
        with reproducible(seed):
            candidate = _maximiser(points, outcomes, bounds, seed, noise)
    except numerical:
        return None
    if not torch.isfinite(candidate).all():
        return None
    return _point(candidate.clamp(bounds[0], bounds[1]).tolist())


def _maximiser(points: Any, outcomes: Any, bounds: Any, seed: int, noise: float | None) -> Any:
    """Return the maximiser `(d,)` of qLogNEI in `bounds` `(2, d)`; `points` `(n, d)`, `outcomes` `(n, 1)`."""
    import torch
    from botorch.acquisition.logei import qLogNoisyExpectedImprovement
    from botorch.optim import optimize_acqf
    from botorch.sampling.normal import SobolQMCNormalSampler

    model = fitted(points, outcomes, noise)
    acquisition = qLogNoisyExpectedImprovement(
        model=model,
        X_baseline=points,
        sampler=SobolQMCNormalSampler(torch.Size([_MONTE_CARLO_SAMPLES]), seed=seed),
        prune_baseline=True,
    )
    candidates, _ = optimize_acqf(
        acquisition,
        bounds=bounds,
        q=1,
        num_restarts=_RESTARTS,
        raw_samples=_RAW_SAMPLES,
        options={"batch_limit": _RESTARTS, "maxiter": _ACQUISITION_ITERATIONS, "seed": seed},
    )
    return candidates.detach().squeeze(0)


def fitted(points: Any, outcomes: Any, noise: float | None) -> Any:
    """Return the Gaussian process fitted to outcomes `(n, 1)` at points `(n, d)`, double precision."""
    import torch
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from botorch.models.transforms.outcome import Standardize
    from gpytorch.mlls import ExactMarginalLogLikelihood

    variances = None if noise is None else torch.full_like(outcomes, noise)
    model = SingleTaskGP(points, outcomes, train_Yvar=variances, outcome_transform=Standardize(m=1))
    fit_gpytorch_mll(
        ExactMarginalLogLikelihood(model.likelihood, model),
        optimizer_kwargs={"options": {"maxiter": _FIT_ITERATIONS}},
    )
    return model


@contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """Seed torch and hold it to one thread inside the block, and put both back: sums then have one order."""
    import torch

    with torch.random.fork_rng(devices=[]), one_thread(), warnings.catch_warnings():
        # What BoTorch warns of (inputs, convergence, jitter) is either handled here or of no use to a caller.
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        yield


def _sobol(dimensions: int, seed: int, position: int) -> list[list[float]]:
    """Return a few points of a scrambled Sobol sequence in the unit cube, from `position` on."""
    from torch import float64
    from torch.quasirandom import SobolEngine

    engine: Any = SobolEngine(dimensions, scramble=True, seed=seed)  # type: ignore[no-untyped-call]
    points: list[list[float]] = engine.fast_forward(position).draw(_DRAWS, dtype=float64).tolist()
    return points


def _point(values: Iterator[float] | Sequence[float]) -> Point:
    return tuple(round(min(max(float(value), 0.0), 1.0), 12) for value in values)
