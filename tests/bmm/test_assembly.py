from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bmm.assembly import Assembler, Solved
from bmm.modules.linear import LinearMap
from bmm.problems import Sums, module_wise
from bmm.search.setting import Setting

QUERY = LinearMap("a.query", 5, 4, "a.query", "qkv", 0, "a.query.weight")
KEY = LinearMap("a.key", 3, 4, "a.query", "qkv", 0, "a.key.weight")
DENSE = LinearMap("a.dense", 4, 6, "a.dense", "mlp-out", 0, "a.dense.weight")
MAPS = (QUERY, KEY, DENSE)


@dataclass
class Case:
    """Random base, anchor, experts and Grams, and how often each Gram was asked for."""

    base: dict[str, torch.Tensor]
    anchor: dict[str, torch.Tensor]
    experts: list[dict[str, torch.Tensor]]
    grams: list[dict[str, torch.Tensor]]
    asked: list[tuple[int, str]]

    def assembler(self, *, keep: bool = True) -> Assembler:
        case = self

        class Weights:
            count = len(case.experts)

            def base(self, name: str) -> torch.Tensor:
                return case.base[name]

            def expert(self, index: int, name: str) -> torch.Tensor:
                return case.experts[index][name]

        def gram(index: int, group: str, sums: Sums) -> torch.Tensor:
            case.asked.append((index, group))
            return case.grams[index][group] * dict(sums[1]).get(str(index), 1.0)

        rows = 50 * len(self.experts)
        weights: Any = Weights()
        problems = module_wise(MAPS, weights, self.anchor.__getitem__, gram, lambda _: rows, keep=keep)
        return Assembler(problems, self.anchor.__getitem__)


def case(seed: int = 0, experts: int = 3) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def weights() -> dict[str, torch.Tensor]:
        return {map_.weight: torch.randn(map_.outputs, map_.inputs, generator=generator) for map_ in MAPS}

    def grams() -> dict[str, torch.Tensor]:
        inputs = {map_.input_group: torch.randn(50, map_.inputs, generator=generator).double() for map_ in (KEY, DENSE)}
        return {group: rows.T @ rows / 50 for group, rows in inputs.items()}

    return Case(weights(), weights(), [weights() for _ in range(experts)], [grams() for _ in range(experts)], [])


@given(seed=st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_the_anchor_comes_back_bit_for_bit(seed: int) -> None:
    made = case(seed)
    weights = made.assembler().weights({map_.module: Setting(math.inf, 1.0) for map_ in MAPS})
    assert weights.keys() == made.anchor.keys()
    for name, weight in weights.items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, made.anchor[name])


@given(seed=st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_no_prior_is_regmean(seed: int) -> None:
    made = case(seed)
    weights = made.assembler().weights({map_.module: Setting(1e-12, 1.0) for map_ in MAPS})
    for map_ in MAPS:
        grams = [part[map_.input_group] for part in made.grams]
        right = sum(e[map_.weight].double() @ g for e, g in zip(made.experts, grams, strict=True))
        wanted = torch.linalg.solve(sum(grams), right, left=False)  # type: ignore[arg-type]
        torch.testing.assert_close(weights[map_.weight].double(), wanted, rtol=1e-5, atol=1e-6)


@given(seed=st.integers(0, 1000), exponent=st.floats(-4, 2), gamma=st.floats(0.5, 1.5))
@settings(max_examples=20, deadline=None)
def test_any_setting_is_the_closed_form(seed: int, exponent: float, gamma: float) -> None:
    made, lam = case(seed), 10**exponent
    solved = made.assembler().solve("a.key", Setting(lam, gamma))
    grams = [part["a.query"] for part in made.grams]
    anchor, base = made.anchor["a.key.weight"].double(), made.base["a.key.weight"].double()
    total = torch.stack(grams).sum(0)
    matrix = total + lam * total.trace() / 4 * torch.eye(4, dtype=torch.float64)
    pull = sum((e["a.key.weight"].double() - anchor) @ g for e, g in zip(made.experts, grams, strict=True))
    mean = anchor + torch.linalg.solve(matrix, pull, left=False)  # type: ignore[arg-type]
    torch.testing.assert_close(solved.solution.double(), base + gamma * (mean - base), rtol=1e-5, atol=1e-6)
    assert solved.condition == pytest.approx(float(torch.linalg.cond(matrix)), rel=1e-6)


def test_gamma_scales_from_the_base_even_on_the_anchor() -> None:
    made = case()
    solved = made.assembler().solve("a.dense", Setting(math.inf, 0.5))
    wanted = (made.base["a.dense.weight"].double() + made.anchor["a.dense.weight"].double()) / 2
    torch.testing.assert_close(solved.solution.double(), wanted, rtol=1e-6, atol=1e-7)
    assert solved.condition == 1.0


def test_a_singular_gram_has_no_condition_number_and_a_finite_weight() -> None:
    made = case()
    for part in made.grams:
        part["a.dense"] = torch.diag(torch.tensor([1.0, 1, 1, 1, 1, 0], dtype=torch.float64))
    solved = made.assembler().solve("a.dense", Setting(0.0, 1.0))
    assert solved.condition is None
    assert torch.isfinite(solved.solution).all()
    # The direction that no input had keeps the anchor.
    torch.testing.assert_close(solved.solution[:, 5], made.anchor["a.dense.weight"][:, 5])


def test_each_gram_is_read_once_whatever_is_solved() -> None:
    made = case()
    assembler = made.assembler()
    for lam in (0.1, 1.0, math.inf):
        assembler.weights({map_.module: Setting(lam, 1.1) for map_ in MAPS})
    assert sorted(made.asked) == [(index, group) for index in range(3) for group in ("a.dense", "a.query")]
    assert all(
        torch.equal(part["a.query"], other["a.query"]) for part, other in zip(made.grams, case().grams, strict=True)
    )


def test_factors_that_are_not_held_give_the_same_weights_and_are_made_once_in_order() -> None:
    made, other = case(), case()
    settings = {map_.module: Setting(0.1, 0.9) for map_ in MAPS}
    held = made.assembler().weights(settings)
    once = other.assembler(keep=False)
    assert other.asked == []
    for name, tensor in once.weights(settings).items():
        assert torch.equal(tensor, held[name])
    assert sorted(other.asked) == sorted(made.asked)


def test_what_a_walk_has_solved_is_taken_from_it_where_the_setting_is_its_own() -> None:
    made = case()
    solution = torch.full((3, 4), 7.0)
    problems = made.assembler(keep=False).problems
    assembler = Assembler(problems, made.anchor.__getitem__, {"a.key": 0.1}, lambda _: Solved(solution, 3.0))
    assert assembler.solve("a.key", Setting(0.1, 1.0)) == Solved(solution, 3.0)
    assert made.asked == []
    for other in (Setting(0.2, 1.0), Setting(0.1, 0.9)):
        assert not torch.equal(assembler.solve("a.key", other).solution, solution)
    assert assembler.solve("a.key", Setting(0.1, 1.0), lambda problem, _: problem.base * 0).solution.shape == (3, 4)
    assert made.asked


def test_a_weight_that_overflows_is_named() -> None:
    made = case()
    made.anchor["a.key.weight"] = torch.full((3, 4), 3e38)
    with pytest.raises(FloatingPointError, match=r"the weight of a\.key is not finite at λ=inf, γ=1\.5"):
        made.assembler().solve("a.key", Setting(math.inf, 1.5))


def test_the_evidence_of_a_map_is_made_of_the_experts_distance_to_the_anchor() -> None:
    made = case()
    found = made.assembler().evidence("a.key")
    grams = [part["a.query"] for part in made.grams]
    apart = [e["a.key.weight"].double() - made.anchor["a.key.weight"].double() for e in made.experts]
    assert found.energy == pytest.approx(
        sum(float((d @ g @ d.T).trace()) for d, g in zip(apart, grams, strict=True)), rel=1e-10
    )
    assert found.rows == 150
    posterior = made.assembler().problems["a.key"].posterior
    assert torch.equal(found.pull, posterior.projection.square().sum(0))
    assert torch.equal(found.eigenvalues, posterior.spectrum.eigenvalues)


def test_a_trial_has_the_weights_of_its_setting() -> None:
    made = case().assembler()
    for gamma in (1.0, 0.9):
        settings = {map_.module: Setting(0.3, gamma) for map_ in MAPS}
        exact, near = made.weights(settings), made.trial(settings)
        assert exact.keys() == near.keys()
        for name, tensor in exact.items():
            assert near[name].dtype == torch.float32
            torch.testing.assert_close(near[name], tensor, rtol=1e-5, atol=1e-5)


def test_a_trial_takes_what_a_walk_has_solved_and_refuses_what_is_not_finite() -> None:
    cases = case()
    known = {map_.module: Solved(torch.full((map_.outputs, map_.inputs), 7.0), None) for map_ in MAPS}
    walked = {map_.module: 0.1 for map_ in MAPS}
    made = Assembler(cases.assembler().problems, cases.anchor.__getitem__, walked, known.__getitem__)  # type: ignore[arg-type]
    assert all(bool((value == 7.0).all()) for value in made.trial({m.module: Setting(0.1, 1.0) for m in MAPS}).values())
    assert not bool((made.trial({m.module: Setting(0.2, 1.0) for m in MAPS})[QUERY.weight] == 7.0).all())
    cases.anchor[QUERY.weight][0, 0] = 1e39 if cases.anchor[QUERY.weight].dtype == torch.float64 else 3e38
    with pytest.raises(FloatingPointError):
        cases.assembler().trial({map_.module: Setting(math.inf, 1000.0) for map_ in MAPS})


@given(
    seed=st.integers(0, 1000),
    exponent=st.floats(-3, 2),
    scale=st.floats(0.0, 2.0),
    weights=st.lists(st.floats(0.25, 4.0), min_size=3, max_size=3),
)
@settings(max_examples=15, deadline=None)
def test_a_scaled_anchor_and_weighted_tasks_are_those_of_a_merge_that_has_them(
    seed: int, exponent: float, scale: float, weights: list[float]
) -> None:
    made, other = case(seed), case(seed)
    other.anchor = {name: made.base[name] + scale * (anchor - made.base[name]) for name, anchor in made.anchor.items()}
    other.grams = [
        {group: gram * weight for group, gram in part.items()} for part, weight in zip(made.grams, weights, strict=True)
    ]
    weighted = tuple((str(index), weight) for index, weight in enumerate(weights))
    asked = {map_.module: Setting(10**exponent, 1.0, scale, None, weighted) for map_ in MAPS}
    plain = {map_.module: Setting(10**exponent, 1.0) for map_ in MAPS}
    wanted = other.assembler().weights(plain)
    for found in (made.assembler().weights(asked), made.assembler().trial(asked)):
        for name, weight in found.items():
            torch.testing.assert_close(weight, wanted[name], rtol=1e-4, atol=1e-5)
    top = {map_.module: Setting(math.inf, 1.0, scale) for map_ in MAPS}
    for name, weight in made.assembler().weights(top).items():
        torch.testing.assert_close(weight, other.anchor[name], rtol=1e-5, atol=1e-6)
