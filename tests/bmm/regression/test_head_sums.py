from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bmm.errors import BMMError
from bmm.modules.linear import LinearMap
from bmm.modules.units import units_of
from bmm.regression.head_sums import HeadSums, output_head
from bmm.regression.moments import TaskSums


def maps(*, bias: bool) -> list[LinearMap]:
    return [
        LinearMap(name, outputs, 3, "one", "other", None, f"{name}.weight", f"{name}.bias" if bias else None)
        for name, outputs in (("one", 12), ("other", 5000))
    ]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4), bias=st.booleans())
def test_they_are_those_of_the_answers(seed: int, sizes: list[int], bias: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    members = maps(bias=bias)
    weights = {f"{map_.module}.weight": torch.randn(map_.outputs, 3, generator=generator) for map_ in members}
    weights |= {f"{map_.module}.bias": torch.randn(map_.outputs, generator=generator) for map_ in members}
    parts = [HeadSums(members, weights.__getitem__) for _ in range(2)]
    plain = TaskSums(members)
    for place, size in enumerate(sizes):
        merged, own = (torch.randn(size, 3, generator=generator) for _ in range(2))
        parts[place % 2].add(merged, own)
        answers = {name: own @ weights[f"{name}.weight"].T for name in ("one", "other")}
        plain.add(merged, {name: answer + bias * weights[f"{name}.bias"] for name, answer in answers.items()})
    parts[0].include(parts[1])
    found, wanted = parts[0].moments(), plain.moments()
    assert found.rows == wanted.rows == (sum(sizes),)
    for name, tensor in wanted.tensors().items():
        torch.testing.assert_close(found.tensors()[name], tensor, rtol=1e-4, atol=1e-4)


def test_a_weight_that_is_not_finite_is_named() -> None:
    members = maps(bias=False)
    sums = HeadSums(members, lambda name: torch.full((12 if name == "one.weight" else 5000, 3), torch.nan))
    sums.add(torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(BMMError, match="the inputs or answers of one are not finite"):
        sums.moments()


@pytest.mark.parametrize(
    ("outputs", "prefix", "wide"),
    [(8, "", True), (7, "", False), (8, "layer.1.", False)],
)
def test_an_output_head_is_wide_and_stands_behind_the_layers(outputs: int, prefix: str, wide: bool) -> None:
    inside = LinearMap("layer.0.q", 2, 2, "layer.0.q", "qkv", 0, "q.weight")
    last = LinearMap(f"{prefix}head", outputs, 2, f"{prefix}head", "other", None, "head.weight")
    units = units_of([inside, last])
    assert (output_head(units) == units[-1]) is wide
    assert output_head(units_of([last, inside])) is None
    assert output_head([]) is None
