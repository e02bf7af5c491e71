from __future__ import annotations

import pytest

from bmm.modules.linear import LinearMap
from bmm.modules.units import layers_of, units_of


def chain(layers: list[int | None]) -> list[LinearMap]:
    names = [f"m{place}" if layer is None else f"stack.layer.{layer}.m{place}" for place, layer in enumerate(layers)]
    return [
        LinearMap(name, 2, 2, name, "other", layer, f"{name}.weight") for name, layer in zip(names, layers, strict=True)
    ]


def test_units_follow_the_layers_and_keep_what_stands_outside() -> None:
    units = units_of(chain([None, 0, 0, 1, None]))
    assert [(unit.name, unit.prefix, len(unit.maps)) for unit in units] == [
        ("outside the layers, from m0", None, 1),
        ("stack.layer.0", "stack.layer.0", 2),
        ("stack.layer.1", "stack.layer.1", 1),
        ("outside the layers, from m4", None, 1),
    ]
    assert layers_of(units) == ("stack.layer.0", "stack.layer.1")


@pytest.mark.parametrize("layers", [[0, None, 1], [0, 1, 0], [None, None]])
def test_layers_that_are_no_unbroken_stack_are_no_chain(layers: list[int | None]) -> None:
    units = units_of(chain(layers))
    assert layers_of(units) == ()
    assert [map_ for unit in units for map_ in unit.maps] == chain(layers)
    assert len({unit.name for unit in units}) == len(units)


def test_two_stacks_are_no_chain() -> None:
    maps = [
        LinearMap(name, 2, 2, name, "other", 0, f"{name}.weight") for name in ("encoder.layer.0.m", "decoder.layer.0.m")
    ]
    assert layers_of(units_of(maps)) == ()


def test_maps_that_read_one_input_stay_together() -> None:
    query, value = (LinearMap(f"layer.0.{name}", 2, 2, "layer.0.q", "qkv", 0, f"{name}.weight") for name in ("q", "v"))
    between = LinearMap("layer.0.m", 2, 2, "layer.0.m", "other", 0, "m.weight")
    (unit,) = units_of([query, between, value])
    assert unit.groups == {"layer.0.q": (query, value), "layer.0.m": (between,)}
