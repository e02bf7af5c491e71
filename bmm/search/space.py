"""What the outer level searches: the hyperparameters of every module group and their place in the unit cube.

Nothing here proposes or evaluates a point (`bmm.search.propose`, `bmm.search.run`); how modules form groups is
`bmm.search.groups`.

The upper end of `search.log10_lambda` stands for `λ = ∞`: there a group keeps its anchor exactly. So the anchor is one
corner of the cube's λ axes rather than a special case, and a search may leave single groups at their anchor. A group
with an end of its own below that one, or with a number, cannot; then the anchor lies outside of the cube, and is tried
all the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from bmm.errors import BMMError, RecipeError
from bmm.search.setting import ANCHOR, Setting
from bmm.search.settings import HYPERPARAMETERS, Hyperparameter, SearchSettings, out_of_bounds

Point = tuple[float, ...]
"""A place in the unit cube, a coordinate for each axis of the space in order."""
Ends = tuple[float, float]

# How far outside the cube rounding may carry a point that lies on its face.
_ROUNDING = 1e-9
_LARGEST_OF_LINE = 15


@dataclass(frozen=True)
class Axis:
    """One searched dimension: a hyperparameter of one group, or of several that share it.

    Attributes:
        key: the hyperparameter.
        groups: whose.
        ends: lower and upper end; the lower is below the upper.
        task: whose weight it is, where the hyperparameter is a task weight.
    """

    key: Hyperparameter
    groups: tuple[str, ...]
    ends: Ends
    task: str | None = None

    @property
    def name(self) -> str:
        """What people call it: `λ of query`, `weight of news in all groups`."""
        what = {"log10_lambda": "λ", "gamma": "γ", "anchor_scale": "anchor scale", "rho": "ρ"}.get(
            self.key, f"weight of {self.task}"
        )
        return f"{what} of {self.groups[0]}" if len(self.groups) == 1 else f"{what} of all"


@dataclass(frozen=True)
class Space:
    """The box that is searched.

    Attributes:
        groups: the module groups.
        log10_lambda: ends of `log10 λ`; equal ends, here and below, fix a hyperparameter.
        gamma: of `γ`.
        anchor_scale: of the anchor's scale.
        rho: of `ρ`; None where Gram matrices are not hybrid.
        task_weights: of each task's weight.
        tasks: the tasks that weights are searched for.
        tied: hyperparameters that all groups without ends of their own share.
        own: the ends that single groups have instead.
        plain_rho: the recipe's `ρ`, where one setting stands for all groups.

    Raises:
        BMMError: there is no group, or one is named twice.
        RecipeError: bounds are not finite, not ordered or too wide, there is no such group, or nothing is left to vary.
    """

    groups: tuple[str, ...]
    log10_lambda: Ends
    gamma: Ends
    anchor_scale: Ends = (1.0, 1.0)
    rho: Ends | None = None
    task_weights: Ends = (1.0, 1.0)
    tasks: tuple[str, ...] = ()
    tied: tuple[Hyperparameter, ...] = ()
    own: Mapping[str, Mapping[Hyperparameter, Ends]] = field(default_factory=dict)
    plain_rho: float | None = None

    def __post_init__(self) -> None:
        if not self.groups or len(set(self.groups)) != len(self.groups):
            raise BMMError(f"a search space needs distinct module groups, at least one, not {list(self.groups)}")
        for key in HYPERPARAMETERS:
            for group in self.groups:
                ends = self._ends(group, key)
                if ends is not None and (wrong := out_of_bounds(key, ends)):
                    raise RecipeError(f"'search.{key}' is {list(ends)}; {wrong}, the lower first")
        for group in self.own:
            if group not in self.groups:
                raise RecipeError(
                    f"'search.groups': there is no module group '{group}'; the groups are {', '.join(self.groups)}"
                )
        if not self.axes:
            raise RecipeError(
                "'search': every hyperparameter has one number, so there is nothing to search; "
                "give one of them a range, or set search: none and regression.lambda"
            )

    @classmethod
    def of(
        cls, settings: SearchSettings, groups: Sequence[str], tasks: Sequence[str] = (), rho: float | None = None
    ) -> Space:
        """Return the space that a recipe asks for.

        Args:
            settings: the recipe's.
            groups: the module groups.
            tasks: names of the experts.
            rho: the recipe's share of the activations in hybrid Gram matrices; None where they are not hybrid.
        """
        return cls(
            tuple(groups),
            settings.log10_lambda,
            settings.gamma,
            settings.anchor_scale,
            settings.rho,
            settings.task_weights,
            tuple(tasks),
            tuple(settings.tied),
            {group: own.ranges() for group, own in settings.groups.items()},
            rho,
        )

    @cached_property
    def axes(self) -> tuple[Axis, ...]:
        """The searched dimensions: group by group, then what groups share."""
        alone = [axis for group in self.groups for axis in self._axes((group,), self._single(group))]
        shared: list[Axis] = []
        for key in self.tied:
            groups = tuple(group for group in self.groups if key not in self.own.get(group, {}))
            if groups:
                shared += self._axes(groups, (key,))
        return (*alone, *shared)

    @property
    def dimensions(self) -> int:
        """The number of searched hyperparameters."""
        return len(self.axes)

    def decode(self, point: Sequence[float]) -> dict[str, Setting]:
        """Return the settings at a point of the unit cube, λ to 12 significant digits and the rest to 12 decimals.

        The rounding makes a setting that was logged and read back equal to the one that was evaluated.

        Raises:
            BMMError: the point has another number of coordinates, or one outside [0, 1].
        """
        if len(point) != self.dimensions or not all(0.0 <= value <= 1.0 for value in point):
            raise BMMError(f"a point of this space has {self.dimensions} coordinates in [0, 1], not {list(point)}")
        values = self._fixed()
        for axis, place in zip(self.axes, point, strict=True):
            low, high = axis.ends
            for group in axis.groups:
                values[group][axis.key, axis.task] = low + place * (high - low)
        return {group: self._setting(group, found) for group, found in values.items()}

    def encode(self, settings: Mapping[str, Setting], *, clip: bool = False) -> Point:
        """Return the point that `settings` stand at; `decode(encode(s)) == s` for all that `decode` returns.

        Args:
            settings: one for each group.
            clip: move what is outside of the bounds to their ends.

        Raises:
            BMMError: the groups are not this space's, or a value lies outside the bounds.
        """
        if set(settings) != set(self.groups):
            raise BMMError(f"the settings are for {sorted(settings)}, the search space is over {sorted(self.groups)}")
        return tuple(self._place(axis, settings[axis.groups[0]], clip=clip) for axis in self.axes)

    def holds(self, settings: Mapping[str, Setting]) -> bool:
        """Say whether settings lie within the bounds."""
        try:
            return self.decode(self.encode(settings)) == dict(settings)
        except BMMError:
            return False

    def anchor(self) -> dict[str, Setting]:
        """Return the settings that publish the anchor: `λ = ∞` and `γ = 1` for every group."""
        return dict.fromkeys(self.groups, ANCHOR)

    def anchor_point(self) -> Point:
        """Return where the anchor stands, λ at its upper end and `γ = 1`, or the place of the cube next to it."""
        return self.encode(self.anchor(), clip=True)

    def plain(self, lam: float) -> dict[str, Setting] | None:
        """Return one `λ` for all groups with everything else as it is without a search, or None outside the bounds.

        A group whose λ is fixed keeps it.
        """
        settings = {}
        for group in self.groups:
            low, high = self._ends(group, "log10_lambda") or self.log10_lambda
            fixed = low == high
            found: dict[tuple[Hyperparameter, str | None], float] = {
                ("log10_lambda", None): low if fixed else math.log10(lam)
            }
            found |= {(key, None): value for key, value in self._plain_values(group).items()}
            weight = self._ends(group, "task_weights") or (1.0, 1.0)
            if weight != (1.0, 1.0):
                found |= {("task_weights", task): min(max(1.0, weight[0]), weight[1]) for task in self.tasks}
            settings[group] = self._setting(group, found)
        return settings if self.holds(settings) else None

    def global_line(self, n: int) -> list[dict[str, Setting]]:
        """Return up to `n` settings with one λ for all groups, evenly spaced in `log10 λ`, the middle ones first.

        They lie strictly inside the bounds: the upper end is the anchor, and the lower is next to RegMean. The first
        of any number of them cover the line as well as so many can.
        """
        low, high = self.log10_lambda
        if low == high:
            return []
        count = min(n, _LARGEST_OF_LINE)
        exponents = [low + step / (count + 1) * (high - low) for step in range(1, count + 1)]
        lines = [self.plain(_significant(10.0 ** exponents[place])) for place in _coarse_to_fine(count)]
        return [settings for settings in lines if settings is not None]

    def across(self, settings: Mapping[str, Setting]) -> list[dict[str, Setting]]:
        """Return `settings` with γ, the anchor's scale or ρ, if searched, at an end of its range in all groups at once.

        One hyperparameter after the other, its upper end first; an end at which `settings` already stand is left out.

        Args:
            settings: within the bounds.

        Raises:
            BMMError: they are not.
        """
        point = self.encode(settings)
        found = []
        for key in ("gamma", "anchor_scale", "rho"):
            for end in (1.0, 0.0):
                moved = [end if axis.key == key else place for axis, place in zip(self.axes, point, strict=True)]
                if (there := self.decode(moved)) != settings:
                    found.append(there)
        return found

    def _ends(self, group: str, key: Hyperparameter) -> Ends | None:
        own = self.own.get(group, {}).get(key)
        if own is not None:
            return own
        ends: Ends | None = getattr(self, key)
        return ends

    def _single(self, group: str) -> tuple[Hyperparameter, ...]:
        own = self.own.get(group, {})
        return tuple(key for key in HYPERPARAMETERS if key in own or key not in self.tied)

    def _axes(self, groups: tuple[str, ...], keys: Sequence[Hyperparameter]) -> Iterator[Axis]:
        for key in keys:
            ends = self._ends(groups[0], key)
            if ends is None or ends[0] == ends[1]:
                continue
            for task in self.tasks if key == "task_weights" else (None,):
                yield Axis(key, groups, ends, task)

    def _fixed(self) -> dict[str, dict[tuple[Hyperparameter, str | None], float]]:
        """Return what is not searched: by group, the value of each fixed hyperparameter."""
        values: dict[str, dict[tuple[Hyperparameter, str | None], float]] = {}
        for group in self.groups:
            values[group] = {}
            for key in HYPERPARAMETERS:
                ends = self._ends(group, key)
                if ends is not None and ends[0] == ends[1] and (key, ends[0]) != ("task_weights", 1.0):
                    for task in self.tasks if key == "task_weights" else (None,):
                        values[group][key, task] = ends[0]
        return values

    def _plain_values(self, group: str) -> dict[Hyperparameter, float]:
        values: dict[Hyperparameter, float] = {"gamma": 1.0, "anchor_scale": 1.0}
        if self._ends(group, "rho") is not None and self.plain_rho is not None:
            values["rho"] = self.plain_rho
        for key in tuple(values):
            low, high = self._ends(group, key) or (values[key], values[key])
            values[key] = min(max(values[key], low), high)
        return values

    def _setting(self, group: str, values: Mapping[tuple[Hyperparameter, str | None], float]) -> Setting:
        lam = self._lambda(group, values["log10_lambda", None])
        gamma = round(values["gamma", None], 12)
        scale = round(values["anchor_scale", None], 12)
        if math.isinf(lam):
            # No data speak, so that neither their blend nor their weights count.
            return Setting(lam, gamma, scale)
        rho = values.get(("rho", None))
        weights = [(task, round(value, 12)) for (key, task), value in values.items() if key == "task_weights" and task]
        if not weights and self._weighs:
            weights = [(task, 1.0) for task in self.tasks]
        return Setting(lam, gamma, scale, None if rho is None else round(rho, 12), tuple(weights))

    @cached_property
    def _weighs(self) -> bool:
        return any(axis.key == "task_weights" for axis in self.axes)

    def _lambda(self, group: str, exponent: float) -> float:
        lam = _significant(10.0**exponent)
        low, high = self._ends(group, "log10_lambda") or self.log10_lambda
        # A number is that number, wherever the anchor stands.
        return math.inf if low < high and lam >= _significant(10.0 ** self.log10_lambda[1]) else lam

    def _place(self, axis: Axis, setting: Setting, *, clip: bool) -> float:
        low, high = axis.ends
        value = _value(axis, setting)
        if value is None:
            # At the anchor these do not count: in the middle of the axis they tell the model the least.
            value = (low + high) / 2
        elif axis.key == "log10_lambda" and value == math.inf:
            value = self.log10_lambda[1]
        scaled = (value - low) / (high - low)
        if not clip and not -_ROUNDING <= scaled <= 1.0 + _ROUNDING:
            raise BMMError(f"{axis.name} is {value:g}, outside the bounds [{low}, {high}]")
        return min(max(scaled, 0.0), 1.0)


def _value(axis: Axis, setting: Setting) -> float | None:
    match axis.key:
        case "log10_lambda":
            return math.log10(setting.lam) if setting.lam > 0 else -math.inf
        case "gamma":
            return setting.gamma
        case "anchor_scale":
            return setting.anchor_scale
        case "rho":
            return setting.rho
    return dict(setting.weights).get(str(axis.task))


def _coarse_to_fine(count: int) -> list[int]:
    """Return the places 0 … count − 1, the middle first, then the middles of what is left, breadth first."""
    order, waiting = [], [(0, count)]
    while waiting:
        low, high = waiting.pop(0)
        if low < high:
            middle = (low + high) // 2
            order.append(middle)
            waiting += [(low, middle), (middle + 1, high)]
    return order


def _significant(value: float) -> float:
    return float(f"{value:.12g}")
