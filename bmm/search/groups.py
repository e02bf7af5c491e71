"""How modules form groups that share their hyperparameters.

A module's type and layer come in from outside (`bmm.modules`); what a group is searched for is `bmm.search.space`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from bmm.errors import BMMError
from bmm.search.settings import Per


@dataclass(frozen=True)
class ModulePlace:
    """One linear module: canonical name, type (`query`, `mlp-out`, ...), index of its layer or None."""

    name: str
    type: str
    depth: int | None


def depth_third(depth: int, layers: int) -> str:
    """Return the third of the network that the middle of layer `depth` (from 0) of `layers` lies in."""
    return ("early", "middle", "late")[(2 * depth + 1) * 3 // (2 * layers)]


def group_name(per: Per, type: str, depth_third: str, module: str) -> str:  # noqa: A002
    """Return the group of a module of this type and depth third when one setting is searched for each `per`.

    Raises:
        BMMError: there is no such grouping.
    """
    match per:
        case "model":
            return "model"
        case "type":
            return type
        case "depth":
            return depth_third
        case "type x depth":
            return f"{type}/{depth_third}"
        case "module":
            return module
    raise BMMError(f"there is no grouping per '{per}'; the groupings are {', '.join(get_args(Per))}")


def groups_of(modules: Sequence[ModulePlace], per: Per) -> dict[str, str]:
    """Return each module's group, in the order of `modules`; the layers are counted from their depths.

    A module outside the layers (a pooler) has type `other` and depth `late`, whatever its own type says.

    Raises:
        BMMError: a module is named twice, or there is no such grouping.
    """
    if len({module.name for module in modules}) != len(modules):
        raise BMMError("a module is named twice; every module belongs to one group")
    layers = 1 + max((module.depth for module in modules if module.depth is not None), default=0)
    return {
        module.name: group_name(per, "other", "late", module.name)
        if module.depth is None
        else group_name(per, module.type, depth_third(module.depth, layers), module.name)
        for module in modules
    }
