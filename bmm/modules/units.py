"""The parts of a walk through a network: which maps are solved together, layer by layer, in firing order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bmm.modules.linear import LinearMap, layer_prefix


@dataclass(frozen=True)
class Unit:
    """One part of the walk: a layer, or the maps that fire before, between or after layers.

    `prefix` is the layer's module, None outside the layers; `groups` are maps by input group, in firing order.
    """

    name: str
    prefix: str | None
    groups: Mapping[str, tuple[LinearMap, ...]]

    @property
    def maps(self) -> tuple[LinearMap, ...]:
        """All maps of the unit."""
        return tuple(map_ for members in self.groups.values() for map_ in members)


def units_of(maps: Sequence[LinearMap]) -> tuple[Unit, ...]:
    """Cut the maps, which are in firing order, into the parts of the walk."""
    parts: list[tuple[str | None, dict[str, list[LinearMap]]]] = []
    place: dict[str, int] = {}
    for map_ in maps:
        prefix = layer_prefix(map_.module)
        if map_.input_group not in place:
            if not parts or parts[-1][0] != prefix:
                parts.append((prefix, {}))
            place[map_.input_group] = len(parts) - 1
        parts[place[map_.input_group]][1].setdefault(map_.input_group, []).append(map_)
    units = []
    names: dict[str, int] = {}
    for prefix, groups in parts:
        name = prefix or f"outside the layers, from {next(iter(groups))}"
        names[name] = names.get(name, 0) + 1
        if names[name] > 1:
            name = f"{name}, part {names[name]}"
        units.append(Unit(name, prefix, {group: tuple(members) for group, members in groups.items()}))
    return tuple(units)


def layers_of(units: Sequence[Unit]) -> tuple[str, ...]:
    """Return the layers in order if they are one unbroken stack, else nothing."""
    prefixes = [unit.prefix for unit in units]
    inside = [prefix for prefix in prefixes if prefix is not None]
    if not inside:
        return ()
    first = prefixes.index(inside[0])
    unbroken = prefixes[first : first + len(inside)] == inside and len(set(inside)) == len(inside)
    stacks = {prefix.rpartition(".")[0] for prefix in inside}
    return tuple(inside) if unbroken and len(stacks) == 1 else ()
