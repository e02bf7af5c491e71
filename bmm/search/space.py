"""What the outer level searches: `log10 λ` and `γ` per module group, and how modules form groups.

Here are the settings, their place in the unit cube, and the groupings. Nothing here proposes or evaluates a
point (`bmm.search.propose`, `bmm.search.run`), and nothing knows how a module's type is found
(`bmm.modules`).

The upper end of `log10 λ` stands for `λ = ∞`: there a group keeps its anchor exactly. So the anchor is one
corner of the cube's λ axes rather than a special case, and a search may leave single groups at their
anchor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from bmm.errors import BMMError, RecipeError
from bmm.search.settings import LARGEST_GAMMA, LARGEST_LOG10_LAMBDA, Per

Point = tuple[float, ...]
"""A place in the unit cube: for each group in order its `log10 λ`, then its `γ`, each scaled to [0, 1]."""

# How far outside the cube rounding may carry a point that lies on its face.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Setting:
    """The hyperparameters of one module group: relative prior strength `lam` (λ), assembly scale `gamma` (γ).

    `lam` may be `math.inf`, the anchor, and 0, RegMean.

    Raises:
        BMMError: `lam` is negative or NaN, or `gamma` is not finite.
    """

    lam: float
    gamma: float

    def __post_init__(self) -> None:
        if not self.lam >= 0 or not math.isfinite(self.gamma):
            raise BMMError(f"a setting needs λ >= 0 and a finite γ, not λ = {self.lam} and γ = {self.gamma}")

    def to_json(self) -> dict[str, float | None]:
        """Return the setting as JSON values; an infinite λ becomes null."""
        return {"lambda": None if math.isinf(self.lam) else float(self.lam), "gamma": float(self.gamma)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Setting:
        """Return the setting that `to_json` wrote."""
        lam = value["lambda"]
        return cls(math.inf if lam is None else float(lam), float(value["gamma"]))


@dataclass(frozen=True)
class Space:
    """The box that is searched: two dimensions a group, `log10 λ` and `γ`, in the order of `groups`.

    Raises:
        BMMError: there is no group, or one is named twice.
        RecipeError: the bounds are not finite, not ordered, too wide, or leave out `γ = 1`, the anchor.
    """

    groups: tuple[str, ...]
    log10_lambda: tuple[float, float]
    gamma: tuple[float, float]

    def __post_init__(self) -> None:
        if not self.groups or len(set(self.groups)) != len(self.groups):
            raise BMMError(f"a search space needs distinct module groups, at least one, not {list(self.groups)}")
        for key, (low, high), largest in (
            ("log10_lambda", self.log10_lambda, LARGEST_LOG10_LAMBDA),
            ("gamma", self.gamma, LARGEST_GAMMA),
        ):
            if not -largest <= low < high <= largest:
                raise RecipeError(
                    f"'search.{key}' is [{low}, {high}]; give a lower and a higher end within ±{largest:g}"
                )
        if not self.gamma[0] <= 1.0 <= self.gamma[1]:
            raise RecipeError(f"'search.gamma' is {list(self.gamma)}; it must include 1, where the anchor stands")

    @property
    def dimensions(self) -> int:
        """The number of searched hyperparameters: two a group."""
        return 2 * len(self.groups)

    def decode(self, point: Sequence[float]) -> dict[str, Setting]:
        """Return the settings at a point of the unit cube, λ to 12 significant digits and γ to 12 decimals.

        The rounding makes a setting that was logged and read back equal to the one that was evaluated.

        Raises:
            BMMError: the point has another number of coordinates, or one outside [0, 1].
        """
        if len(point) != self.dimensions or not all(0.0 <= value <= 1.0 for value in point):
            raise BMMError(f"a point of this space has {self.dimensions} coordinates in [0, 1], not {list(point)}")
        settings = {}
        low, high = self.gamma
        for place, group in enumerate(self.groups):
            scaled_lambda, scaled_gamma = point[2 * place], point[2 * place + 1]
            settings[group] = Setting(self._lambda(scaled_lambda), round(low + scaled_gamma * (high - low), 12))
        return settings

    def encode(self, settings: Mapping[str, Setting]) -> Point:
        """Return the point that `settings` stand at; `decode(encode(s)) == s` for all that `decode` returns.

        Raises:
            BMMError: the groups are not this space's, or a value lies outside the bounds.
        """
        if set(settings) != set(self.groups):
            raise BMMError(f"the settings are for {sorted(settings)}, the search space is over {sorted(self.groups)}")
        point: list[float] = []
        for group in self.groups:
            lam, gamma = settings[group].lam, settings[group].gamma
            exponent = self.log10_lambda[1] if math.isinf(lam) else math.log10(lam) if lam > 0 else -math.inf
            for key, value, (low, high) in (
                ("log10 λ", exponent, self.log10_lambda),
                ("γ", gamma, self.gamma),
            ):
                scaled = (value - low) / (high - low)
                if not -_ROUNDING <= scaled <= 1.0 + _ROUNDING:
                    raise BMMError(f"{key} = {value} of group '{group}' is outside the bounds [{low}, {high}]")
                point.append(min(max(scaled, 0.0), 1.0))
        return tuple(point)

    def anchor(self) -> dict[str, Setting]:
        """Return the settings that publish the anchor: `λ = ∞` and `γ = 1` for every group."""
        return dict.fromkeys(self.groups, Setting(math.inf, 1.0))

    def anchor_point(self) -> Point:
        """Return where the anchor stands: λ at its upper end, `γ = 1`."""
        return self.encode(self.anchor())

    def plain_point(self, lam: float) -> Point | None:
        """Return where one `λ` for all groups and `γ = 1` stand, or None outside the bounds."""
        low, high = self.log10_lambda
        exponent = math.log10(lam)
        if not low <= exponent < high:
            return None
        return self.encode(dict.fromkeys(self.groups, Setting(lam, 1.0)))

    def global_line(self, n: int) -> list[Point]:
        """Return `n` points with one λ for all groups, evenly spaced in `log10 λ`, and `γ = 1`.

        They lie strictly inside the bounds: the upper end is the anchor, and the lower is next to RegMean.
        """
        _, scaled_gamma = self.anchor_point()[:2]
        return [(step / (n + 1), scaled_gamma) * len(self.groups) for step in range(1, n + 1)]

    def _lambda(self, scaled: float) -> float:
        low, high = self.log10_lambda
        lam = _significant(10.0 ** (low + scaled * (high - low)))
        return math.inf if lam >= _significant(10.0**high) else lam


def _significant(value: float) -> float:
    return float(f"{value:.12g}")


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
