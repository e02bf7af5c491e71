"""Prior strengths that no search chooses: as the recipe gives them, or the most probable, a setting for each group."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any

from bmm.errors import RecipeError
from bmm.regression.evidence import Evidence, most_probable
from bmm.search.setting import Setting

GAMMA = 1.0
"""Where nothing is measured nothing says that the merged model should be nearer to the base, or further from it."""


def check_groups(strength: Any, groups: Mapping[str, str]) -> None:
    """Refuse strengths by group that are not those of these groups.

    Args:
        strength: `regression.lambda`, as the recipe has it.
        groups: each module's group.

    Raises:
        RecipeError: a group has no number, or a number no group.
    """
    if not isinstance(strength, Mapping):
        return
    known = list(dict.fromkeys(groups.values()))
    for group in strength:
        if group not in known:
            raise RecipeError(
                f"'regression.lambda': there is no module group '{group}'; the groups are {', '.join(known)}"
            )
    for group in known:
        if group not in strength:
            raise RecipeError(f"'regression.lambda': the module group '{group}' has no number; add one")


def settings_without_search(
    strength: Any,
    groups: Mapping[str, str],
    evidence: Callable[[str], Evidence],
    held_out: Mapping[str, float],
    log10_lambda: tuple[float, float],
) -> dict[str, Setting]:
    """Return the setting of each group.

    Args:
        strength: `evidence`, `held-out`, a number, or numbers by group.
        groups: each module's group.
        evidence: gives a module's evidence.
        held_out: each module's strength, where rows held out have chosen it.
        log10_lambda: between which strengths the most probable is looked for.
    """
    members: dict[str, list[str]] = {}
    for module, group in groups.items():
        members.setdefault(group, []).append(module)

    def of(group: str) -> float:
        if strength == "evidence":
            return most_probable([evidence(module) for module in members[group]], log10_lambda)
        if strength == "held-out":
            found = [held_out[module] for module in members[group]]
            # As it stands where all agree, so that what the walk has solved with it holds.
            return found[0] if len(set(found)) == 1 else math.exp(statistics.fmean(map(math.log, found)))
        return float(strength[group] if isinstance(strength, Mapping) else strength)

    return {group: Setting(of(group), GAMMA) for group in members}


def described(strength: Any) -> str:
    """Return how the strengths were chosen, in one word: `evidence`, `held-out` or `fixed`."""
    return strength if isinstance(strength, str) else "fixed"
