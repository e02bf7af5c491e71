"""The unit cube and the settings it stands for; the groupings."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bmm.errors import BMMError, RecipeError
from bmm.search.groups import ModulePlace, depth_third, group_name, groups_of
from bmm.search.setting import Setting
from bmm.search.settings import Per
from bmm.search.space import Space

modest = settings(deadline=None, max_examples=25)


@st.composite
def spaces(draw: st.DrawFn) -> Space:
    groups = draw(st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=5, unique=True))
    low = draw(st.floats(-10, 9))
    high = low + draw(st.floats(0.01, 10))
    return Space(tuple(groups), (low, high), (draw(st.floats(-1, 1)), draw(st.floats(1.01, 3))))


@st.composite
def places(draw: st.DrawFn) -> tuple[Space, Sequence[float]]:
    space = draw(spaces())
    coordinate = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1.0, math.nextafter(1.0, 0.0), 5e-324]))
    return space, draw(st.lists(coordinate, min_size=space.dimensions, max_size=space.dimensions))


def a_space(groups: int = 2) -> Space:
    return Space(tuple(f"g{number}" for number in range(groups)), (-4.0, 2.0), (0.5, 1.5))


@modest
@given(places())
def test_decode_encode_round_trip_is_exact(place: tuple[Space, Sequence[float]]) -> None:
    space, point = place
    decoded = space.decode(point)
    encoded = space.encode(decoded)
    assert space.decode(encoded) == decoded
    assert encoded == pytest.approx(tuple(point), abs=1e-9)


@modest
@given(places())
def test_decoded_values_lie_within_the_bounds(place: tuple[Space, Sequence[float]]) -> None:
    space, point = place
    for setting in space.decode(point).values():
        assert math.isinf(setting.lam) or (
            space.log10_lambda[0] - 1e-9 <= math.log10(setting.lam) <= space.log10_lambda[1]
        )
        assert space.gamma[0] - 1e-12 <= setting.gamma <= space.gamma[1] + 1e-12


@modest
@given(places())
def test_settings_survive_json(place: tuple[Space, Sequence[float]]) -> None:
    space, point = place
    for setting in space.decode(point).values():
        assert Setting.from_json(json.loads(json.dumps(setting.to_json(), allow_nan=False))) == setting


def test_infinite_lambda_is_null_in_json() -> None:
    assert Setting(math.inf, 1.0).to_json() == {"lambda": None, "gamma": 1.0}


def test_decode_scales_logarithmically_in_group_order() -> None:
    assert a_space().decode((0.5, 0.25, 0.0, 1.0)) == {"g0": Setting(0.1, 0.75), "g1": Setting(1e-4, 1.5)}


@modest
@given(spaces())
def test_the_anchor_is_the_upper_end_of_lambda(space: Space) -> None:
    point = space.anchor_point()
    assert space.decode(point) == space.anchor() == dict.fromkeys(space.groups, Setting(math.inf, 1.0))
    assert all(value == 1.0 for value in point[::2])


def test_the_global_line_is_evenly_spaced_inside_the_bounds() -> None:
    line = a_space(3).global_line(5)
    assert all(len(set(settings.values())) == 1 for settings in line)
    first = [settings["g0"] for settings in line]
    assert sorted(setting.lam for setting in first) == [1e-3, 1e-2, 1e-1, 1.0, 10.0]
    # The middle first, then on both sides of it.
    assert [setting.lam for setting in first[:2]] == [1e-1, 1e-2]
    assert {setting.gamma for setting in first} == {1.0}


def test_what_lies_across_moves_one_hyperparameter_of_all_groups() -> None:
    space = Space(("mlp", "attention"), (-4.0, 2.0), (0.9, 1.1), (0.8, 1.2), own={"mlp": {"gamma": (1.0, 1.05)}})
    settings = dict.fromkeys(space.groups, Setting(0.1, 1.0))
    across = space.across(settings)
    assert [[(there[group].gamma, there[group].anchor_scale) for group in space.groups] for there in across] == [
        [(1.05, 1.0), (1.1, 1.0)],
        [(1.0, 1.0), (0.9, 1.0)],
        [(1.0, 1.2), (1.0, 1.2)],
        [(1.0, 0.8), (1.0, 0.8)],
    ]
    assert {setting.lam for there in across for setting in there.values()} == {0.1}
    # Where it stands already it does not go.
    assert across[0] not in space.across(across[0])


@pytest.mark.parametrize("point", [(0.5,), (0.5,) * 5, (0.5, 0.5, 0.5, 1.1), (0.5, -0.1, 0.5, 0.5), (math.nan,) * 4])
def test_decode_refuses_what_is_not_in_the_cube(point: tuple[float, ...]) -> None:
    with pytest.raises(BMMError, match="4 coordinates"):
        a_space().decode(point)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"g0": Setting(1e3, 1.0)}, "λ of g0 is 3, outside the bounds"),
        ({"g0": Setting(0.0, 1.0)}, "outside the bounds"),
        ({"g0": Setting(1.0, 2.0)}, "outside the bounds"),
        ({"stranger": Setting(1.0, 1.0)}, "search space is over"),
    ],
)
def test_encode_refuses_what_is_outside(changed: dict[str, Setting], message: str) -> None:
    with pytest.raises(BMMError, match=message):
        a_space().encode({**a_space().anchor(), **changed})


@pytest.mark.parametrize(("lam", "gamma"), [(-1.0, 1.0), (math.nan, 1.0), (1.0, math.inf), (1.0, math.nan)])
def test_a_setting_must_make_sense(lam: float, gamma: float) -> None:
    with pytest.raises(BMMError, match="a setting needs"):
        Setting(lam, gamma)


@pytest.mark.parametrize(
    ("log10_lambda", "gamma", "key"),
    [
        ((-4.0, math.inf), (0.5, 1.5), "log10_lambda"),
        ((2.0, -4.0), (0.5, 1.5), "log10_lambda"),
        ((-400.0, 2.0), (0.5, 1.5), "log10_lambda"),
        ((-4.0, 2.0), (0.5, math.nan), "gamma"),
        ((-4.0, 2.0), (0.5, 1e4), "gamma"),
    ],
)
def test_impossible_bounds_name_their_key(
    log10_lambda: tuple[float, float], gamma: tuple[float, float], key: str
) -> None:
    with pytest.raises(RecipeError, match=f"search.{key}"):
        Space(("model",), log10_lambda, gamma)


@pytest.mark.parametrize("groups", [(), ("a", "a")])
def test_groups_are_distinct(groups: tuple[str, ...]) -> None:
    with pytest.raises(BMMError, match="distinct module groups"):
        Space(groups, (-4.0, 2.0), (0.5, 1.5))


MODULES = [
    ModulePlace("encoder.layer.0.attention.query", "query", 0),
    ModulePlace("encoder.layer.2.attention.query", "query", 2),
    ModulePlace("encoder.layer.5.output", "mlp-out", 5),
    ModulePlace("pooler", "pooler", None),
]


@pytest.mark.parametrize(
    ("per", "groups"),
    [
        ("model", ["model", "model", "model", "model"]),
        ("type", ["query", "query", "mlp-out", "other"]),
        ("depth", ["early", "middle", "late", "late"]),
        ("type x depth", ["query/early", "query/middle", "mlp-out/late", "other/late"]),
        ("module", [module.name for module in MODULES]),
    ],
)
def test_groupings(per: Per, groups: list[str]) -> None:
    assert groups_of(MODULES, per) == dict(zip([module.name for module in MODULES], groups, strict=True))


@pytest.mark.parametrize(
    ("layers", "thirds"),
    [(1, "m"), (2, "el"), (3, "eml"), (4, "emml"), (6, "eemmll"), (12, "eeeemmmmllll")],
)
def test_depth_thirds(layers: int, thirds: str) -> None:
    assert "".join(depth_third(depth, layers)[0] for depth in range(layers)) == thirds


def test_an_unknown_grouping_and_a_module_named_twice_are_refused() -> None:
    with pytest.raises(BMMError, match="no grouping per 'head'"):
        group_name("head", "query", "early", "q")  # type: ignore[arg-type]
    with pytest.raises(BMMError, match="named twice"):
        groups_of([MODULES[0], MODULES[0]], "model")


def test_modules_without_layers_can_be_grouped() -> None:
    assert groups_of([MODULES[3]], "depth") == {"pooler": "late"}


def test_fixed_tied_and_own_ranges_make_the_axes() -> None:
    space = Space(
        ("a", "b", "c"),
        (-4.0, 2.0),
        (1.0, 1.0),
        anchor_scale=(0.5, 1.5),
        rho=(0.0, 1.0),
        task_weights=(0.5, 2.0),
        tasks=("news", "mail"),
        tied=("anchor_scale", "task_weights"),
        own={"b": {"log10_lambda": (-1.0, -1.0), "anchor_scale": (1.0, 2.0)}, "c": {"gamma": (0.9, 1.0)}},
        plain_rho=0.3,
    )
    assert [(axis.name, axis.ends) for axis in space.axes] == [
        ("λ of a", (-4.0, 2.0)),
        ("ρ of a", (0.0, 1.0)),
        ("anchor scale of b", (1.0, 2.0)),
        ("ρ of b", (0.0, 1.0)),
        ("λ of c", (-4.0, 2.0)),
        ("γ of c", (0.9, 1.0)),
        ("ρ of c", (0.0, 1.0)),
        ("anchor scale of all", (0.5, 1.5)),
        ("weight of news of all", (0.5, 2.0)),
        ("weight of mail of all", (0.5, 2.0)),
    ]
    settings = space.decode([0.5] * space.dimensions)
    weights = (("news", 1.25), ("mail", 1.25))
    assert settings == {
        "a": Setting(0.1, 1.0, 1.0, 0.5, weights),
        "b": Setting(0.1, 1.0, 1.5, 0.5, weights),
        "c": Setting(0.1, 0.95, 1.0, 0.5, weights),
    }
    assert space.decode(space.encode(settings)) == settings
    plain = space.plain(0.1)
    assert plain is not None
    assert plain["a"] == Setting(0.1, 1.0, 1.0, 0.3, (("news", 1.0), ("mail", 1.0)))
    # A group with a number cannot be left at its anchor, which is tried all the same.
    assert not space.holds(space.anchor())
    assert space.decode(space.anchor_point())["b"] == Setting(0.1, 1.0, 1.0, 0.5, weights)


def test_an_end_of_a_groups_own_below_the_top_is_no_anchor() -> None:
    space = Space(("a", "b"), (-4.0, 2.0), (0.9, 1.1), own={"a": {"log10_lambda": (-2.0, 0.0)}})
    top = space.decode([1.0] * 4)
    assert (top["a"].lam, top["b"].lam) == (1.0, math.inf)
    assert not space.holds(space.anchor())
    assert space.plain(10.0) is None


@pytest.mark.parametrize("exponent", [2.0, 3.0])
def test_a_groups_own_number_is_that_number(exponent: float) -> None:
    space = Space(("a", "b"), (-4.0, 2.0), (1.0, 1.0), own={"b": {"log10_lambda": (exponent, exponent)}})
    settings = space.decode([1.0])
    assert (settings["a"].lam, settings["b"].lam) == (math.inf, 10.0**exponent)
    plain = space.plain(0.1)
    assert plain is not None
    assert plain["b"].lam == 10.0**exponent


@pytest.mark.parametrize(("ends", "weight"), [((0.5, 0.9), 0.9), ((0.5, 2.0), 1.0), ((1.5, 2.0), 1.5)])
def test_the_line_of_one_lambda_weighs_tasks_as_evenly_as_it_may(ends: tuple[float, float], weight: float) -> None:
    tasks = ("mail", "news")
    own = Space(("a", "b"), (-4.0, 2.0), (0.9, 1.1), tasks=tasks, own={"b": {"task_weights": ends}})
    for space in (Space(("a", "b"), (-4.0, 2.0), (0.9, 1.1), task_weights=ends, tasks=tasks), own):
        line = space.global_line(5)
        assert len(line) == 5
        assert all(settings["b"].weights == (("mail", weight), ("news", weight)) for settings in line)


def test_groups_and_ranges_that_cannot_be_are_named() -> None:
    with pytest.raises(RecipeError, match="no module group 'd'; the groups are a"):
        Space(("a",), (-4.0, 2.0), (0.9, 1.1), own={"d": {"gamma": (1.0, 1.0)}})
    with pytest.raises(RecipeError, match="nothing to search"):
        Space(("a",), (-1.0, -1.0), (1.0, 1.0))


@modest
@given(st.integers(0, 15))
def test_a_longer_line_begins_with_the_middle(count: int) -> None:
    line = [settings["g0"].lam for settings in a_space().global_line(count)]
    assert len(line) == len(set(line)) == count
    if count % 2:
        assert line[0] == 0.1
