"""What a trial costs beyond the forward passes, and a proposal in many dimensions, each beside an evaluation.

By turns in one process, so that neighbours on the machine slow all of them alike. Part of `benchmarks.searchers`.
"""

from __future__ import annotations

import random
from typing import Any

from benchmarks.measuring import by_turns, ratio, seconds
from benchmarks.runs import Bench

from bmm.prediction import StoredWeights
from bmm.recipe import Recipe
from bmm.requests import Requests
from bmm.search.plan import Plan, trial_seed
from bmm.search.propose import initial_design, propose
from bmm.search.setting import Setting
from bmm.search.space import Space
from bmm.search.trial import Origin, Trial
from bmm.sources import Inputs
from bmm.stages.assembling import assembler_of, module_groups
from bmm.stages.objective import Objective
from bmm.stages.request import Work
from bmm.stages.setup import setup_of

GROUPS = 48
TRIALS = 40


def trial_costs(bench: Bench, recipe: Recipe, inputs: Inputs, results: Any, repetitions: int = 5) -> dict[str, Any]:
    """Return how a trial's assembly and a proposal in 96 dimensions compare with a whole evaluation.

    Args:
        bench: the zoo.
        recipe: with a search.
        inputs: the recipe's.
        results: of the stages before the search.
        repetitions: of each measurement.
    """
    work = Work(bench.store)
    request = Requests(recipe, inputs).build("search", results)
    setup = setup_of(work, request)
    anchored = StoredWeights(work.read(request.inputs["anchor"]))
    groups = module_groups(setup, recipe.search.per)
    objective = Objective(work, request, setup, groups, anchored)
    draw = random.Random(0)
    space = Space(tuple(f"group {place}" for place in range(GROUPS)), (-4.0, 2.0), (0.9, 1.1))
    history = _history(space, draw)
    plan = Plan(trials=TRIALS + 1, seed=0, noise=1e-4)
    proposed = {trial.index: (trial.origin, trial.point) for trial in history}
    with setup.weights() as weights:
        assembler = assembler_of(work, request, setup, weights, anchored)

        def settings() -> dict[str, Setting]:
            return {group: Setting(10 ** draw.uniform(-3, 1), draw.uniform(0.9, 1.1)) for group in groups.values()}

        def assemble() -> float:
            chosen = settings()
            return seconds(lambda: assembler.trial({module: chosen[group] for module, group in groups.items()}))

        taken = by_turns(
            {
                "evaluation": lambda: seconds(lambda: objective.evaluate(assembler, settings(), None)),
                "assembly": assemble,
                "proposal": lambda: seconds(lambda: propose(space, history, proposed, plan, TRIALS)),
            },
            repetitions,
        )
    return {
        "assembly_vs_evaluation": ratio(taken["assembly"], taken["evaluation"]),
        "proposal_96_dimensions_vs_evaluation": ratio(taken["proposal"], taken["evaluation"]),
    }


def _history(space: Space, draw: random.Random) -> list[Trial]:
    """Return as many trials as a search has at its end, best near the middle of the cube."""
    points: list[tuple[Origin, tuple[float, ...]]] = [
        (origin, point) for origin, point, _ in initial_design(space, Plan(trials=TRIALS, seed=0))
    ]
    while len(points) < TRIALS:
        place = tuple(round(min(max(draw.gauss(0.5, 0.15), 0.0), 1.0), 6) for _ in range(space.dimensions))
        points.append(("sobol" if len(points) < 14 else "bayesian", place))
    return [
        Trial(
            index,
            origin,
            space.decode(point),
            1 - sum((value - 0.5) ** 2 for value in point) / 100,
            {},
            point,
            "complete",
            None,
            trial_seed(0, index),
        )
        for index, (origin, point) in enumerate(points)
    ]
