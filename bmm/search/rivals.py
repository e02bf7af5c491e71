"""Searchers without a model of the objective, for comparison: random, Sobol, CMA-ES.

Pure functions of what was proposed and found before, as all proposals are. After the anchor and the plain setting they
draw from the whole cube.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from bmm.errors import RecipeError
from bmm.search.plan import Plan, trial_seed
from bmm.search.region import as_point
from bmm.search.space import Point, Space
from bmm.search.trial import Origin, Trial, best_of

Proposed = Mapping[int, tuple[Origin, Point]]
"""By index, what was proposed before and by whom, whether it is finished or under way."""

_FIRST_STEP = 0.2
"""CMA-ES's first standard deviation, a fifth of each axis (Hansen, arXiv 1604.00772, advises 0.3 of an unknown box)."""


def random_point(space: Space, plan: Plan, index: int) -> Point:
    """Return a uniform draw from the cube."""
    import numpy as np

    return as_point(np.random.default_rng(trial_seed(plan.seed, index, "random")).random(space.dimensions).tolist())


def sobol_points(dimensions: int, seed: int, position: int, count: int) -> list[list[float]]:
    """Return points of a scrambled Sobol sequence in the unit cube, from `position` on."""
    from torch import float64
    from torch.quasirandom import SobolEngine

    engine: Any = SobolEngine(dimensions, scramble=True, seed=seed)  # type: ignore[no-untyped-call]
    points: list[list[float]] = engine.fast_forward(position).draw(count, dtype=float64).tolist()
    return points


def cma_es_point(space: Space, history: Sequence[Trial], proposed: Proposed, plan: Plan, index: int) -> Point:
    """Return what Optuna's CMA-ES asks for next, its state found again by telling it the whole story.

    Args:
        space: what is searched.
        history: the trials that are finished.
        proposed: all that was proposed before.
        plan: of the search.
        index: the trial's.

    Raises:
        RecipeError: Optuna is not installed.
    """
    try:
        import optuna
        from optuna.samplers import CmaEsSampler
    except ImportError:
        raise RecipeError(
            "'search.searcher': cma-es needs Optuna; install the extra: pip install 'bayesian-model-merging[cma-es]'"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    names = [f"x{place:04d}" for place in range(space.dimensions)]
    box = {name: optuna.distributions.FloatDistribution(0.0, 1.0) for name in names}
    own = sorted(place for place, (origin, _) in proposed.items() if origin == "cma-es")
    # What was finished when the first was asked for, or each would start from elsewhere.
    first = max(1, (own[0] if own else index) - plan.lag)
    design = [trial for trial in history if trial.index < first and trial.objective is not None]
    start = (best_of(design) or history[0]).point
    with warnings.catch_warnings():
        # That it is experimental, and what it does at the first trial.
        warnings.simplefilter("ignore")
        sampler = CmaEsSampler(
            x0=dict(zip(names, start, strict=True)), sigma0=_FIRST_STEP, seed=trial_seed(plan.seed, 0, "cma-es")
        )
        study = optuna.create_study(direction="maximize", sampler=sampler)
        for trial in design:
            study.add_trial(
                optuna.trial.create_trial(
                    params=dict(zip(names, trial.point, strict=True)), distributions=dict(box), value=trial.objective
                )
            )
        known = {trial.index: trial for trial in history}
        asked: dict[int, Any] = {}
        for place in [*own, index]:
            # What was finished when that one was proposed.
            for told in [told for told in asked if told < place - plan.lag and told in known]:
                _tell(study, asked.pop(told), known[told])
            asked[place] = study.ask(dict(box))
        params = asked[index].params
    return as_point([params[name] for name in names])


def _tell(study: Any, asked: Any, trial: Trial) -> None:
    from optuna.trial import TrialState

    if trial.objective is None:
        study.tell(asked, state=TrialState.FAIL)
    else:
        study.tell(asked, trial.objective)
