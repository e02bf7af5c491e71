"""Which point is tried next: the first design, then what the recipe's searcher says.

Pure functions of the space, the trials and the plan; nothing is evaluated and nothing is written here. The same
history gives the same proposal, also after it was read back from the log, in another process, on any number of cores.

The design. The anchor comes first, then the setting of a walk, then a line of one λ for all groups with `γ = 1`, coarse
to fine, so that a longer search begins like a shorter one: most of what there is to win lies on that line, and random
points of the whole box are worse than its best (measured; see the project's notes on the outer level). At its best
point `γ`, and the anchor's scale and `ρ` where they are searched, then go to either end of their range in all groups
at once: what moves the whole model is seen through the rows' noise where the same step in one group is not. Everything
after that is drawn near the best trial so far, in a trust region (`bmm.search.region`): first a few scrambled Sobol
points in it, then the maximiser of the acquisition function (`bmm.search.bayesian`). Searchers for comparison
(`bmm.search.rivals`) have the anchor and the setting of the walk as their design, and the whole cube after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bmm.search.bayesian import bayesian
from bmm.search.plan import Plan, trial_seed
from bmm.search.region import as_point, trust_region
from bmm.search.rivals import Proposed, cma_es_point, random_point, sobol_points
from bmm.search.setting import Setting
from bmm.search.space import Point, Space
from bmm.search.trial import Origin, Trial, best_of

LINE_POINTS = 7
_FIT_ATTEMPTS = 2
_DRAWS = 8

Designed = tuple[Origin, Point, Mapping[str, Setting]]


def initial_design(space: Space, plan: Plan) -> list[Designed]:
    """Return the trials that need no history: the anchor, the walk's `λ` for all groups, then the global-λ line.

    What ends the first design depends on the best of these, and comes from `propose`: the same point with `γ` at either
    end, and local Sobol points.
    """
    design: list[Designed] = [("anchor", space.anchor_point(), space.anchor())]
    plain = [] if plan.reference is None else [space.plain(plan.reference)]
    if plan.searcher in ("bayesian", "saas"):
        plain += space.global_line(LINE_POINTS)
    for settings in plain:
        if settings is not None and settings not in [known for _, _, known in design]:
            design.append(("global", space.encode(settings), settings))
    return design


def local_sobol_points(space: Space) -> int:
    """Return how many Sobol points come before the first Gaussian process: half the dimensions, 2 to 5."""
    return max(2, min(5, space.dimensions // 2))


def propose(space: Space, history: Sequence[Trial], proposed: Proposed, plan: Plan, index: int) -> tuple[Origin, Point]:
    """Return the next point to try.

    When the numbers fail (a covariance that is not positive definite, a fit that does not converge) or a proposal was
    tried before, a seeded Sobol point takes its place.

    Args:
        space: what is searched.
        history: the trials that are finished and whose outcomes the proposal may know, by index.
        proposed: all that was proposed before this trial, by index.
        plan: of the search.
        index: the trial's.

    Raises:
        BMMError: no trial of the history is complete.
    """
    tried = [settings for _, point in proposed.values() if (settings := space.decode(point))]
    drawn = sum(origin == "sobol" for origin, _ in proposed.values())
    if plan.searcher in ("random", "sobol", "cma-es"):
        return _rival(space, history, proposed, plan, index, drawn)
    kept = [trial for trial in history if trial.state == "complete" and not plan.shortfall(trial)]
    region = trust_region(history, kept if plan.floors else None)
    across = _across(space, kept, plan, index) or _across(space, history, plan, index)
    if across is not None and across not in tried:
        return "global", space.encode(across)
    known = {trial.index for trial in history}
    pending = [point for place, (_, point) in sorted(proposed.items()) if place not in known]
    if drawn >= local_sobol_points(space):
        for attempt in range(_FIT_ATTEMPTS):
            seed = trial_seed(plan.seed, index, f"bayesian {attempt}")
            point = bayesian(space, history, pending, region, plan, seed)
            if point is not None and space.decode(point) not in tried:
                return "bayesian", point
    places = sobol_points(space.dimensions, trial_seed(plan.seed, 0, "sobol"), drawn, _DRAWS)
    draws = [region.at(place) for place in places]
    return "sobol", next((point for point in draws if space.decode(point) not in tried), draws[-1])


def _across(space: Space, trials: Sequence[Trial], plan: Plan, index: int) -> Mapping[str, Setting] | None:
    """Return the setting across the line that is this trial's, from the best of these that lies on it; None if none."""
    design = initial_design(space, plan)
    on_line = [trial for trial in trials if trial.index < len(design) and trial.origin == "global"]
    best = best_of(on_line)
    if best is None:
        return None
    ends = space.across(best.settings)
    place = index - len(design)
    return ends[place] if place < len(ends) else None


def _rival(
    space: Space, history: Sequence[Trial], proposed: Proposed, plan: Plan, index: int, drawn: int
) -> tuple[Origin, Point]:
    match plan.searcher:
        case "random":
            return "random", random_point(space, plan, index)
        case "cma-es":
            return "cma-es", cma_es_point(space, history, proposed, plan, index)
    return "sobol", as_point(sobol_points(space.dimensions, trial_seed(plan.seed, 0, "sobol"), drawn, 1)[0])
