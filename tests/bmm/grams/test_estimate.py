from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bmm.anchors.task_vectors import TaskVectors
from bmm.anchors.wudi import minimise, normal_equations
from bmm.errors import BMMError
from bmm.grams.collect import GramSum
from bmm.grams.estimate import blend, from_task_vectors
from bmm.modules.linear import LinearMap
from bmm.regression.posterior import decompose, factor, residual

SEEDS = st.integers(0, 2**31)
NAME = "map.weight"


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mean_gram(part: GramSum) -> Tensor:
    return part.total / part.rows


class Held:
    """Base and experts of one tensor, as a method of merging is given them."""

    def __init__(self, base: Tensor, experts: list[Tensor]) -> None:
        self.count = len(experts)
        self._base, self._experts = {NAME: base}, [{NAME: expert} for expert in experts]

    def names(self) -> tuple[str, ...]:
        return (NAME,)

    def maps(self, name: str) -> list[LinearMap]:
        return [LinearMap(name, *self._base[name].shape, name, "other", None, name)]

    def base(self, name: str) -> Tensor:
        return self._base[name]

    def expert(self, index: int, name: str) -> Tensor:
        return self._experts[index][name]


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, outputs=st.integers(6, 12), inputs=st.integers(1, 6), experts=st.integers(1, 4))
def test_wudis_exact_minimiser_is_the_regression_on_these_grams(
    seed: int, outputs: int, inputs: int, experts: int
) -> None:
    base = draw(seed, outputs, inputs)
    vectors = (
        draw(seed + 1, experts, outputs, inputs) * torch.logspace(-2, 1, experts, dtype=torch.float64)[:, None, None]
    )
    grams = [mean_gram(from_task_vectors([vector])) for vector in vectors]
    closed = sum(v @ g for v, g in zip(vectors, grams, strict=True)) @ torch.linalg.pinv(sum(grams), hermitian=True)  # type: ignore[arg-type]

    held = Held(base, [base + vector for vector in vectors])
    system = normal_equations(TaskVectors(NAME, held))
    assert system is not None
    update = minimise(*system, 1e-12)
    torch.testing.assert_close(update, closed, rtol=1e-6, atol=1e-8)

    # And with the base as the prior mean, the posterior tends to it as the prior's strength goes to zero.
    spectrum = decompose(sum(grams), where="map")  # type: ignore[arg-type]
    pull = residual(base, [base + vector for vector in vectors], grams)
    torch.testing.assert_close(factor(spectrum, base, pull).mean(0.0), base + closed, rtol=1e-5, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, outputs=st.integers(1, 8), inputs=st.integers(1, 8), scale=st.sampled_from([1e-12, 1.0, 1e6]))
def test_an_estimate_has_trace_one_and_forgets_how_far_the_expert_moved(
    seed: int, outputs: int, inputs: int, scale: float
) -> None:
    vector = draw(seed, outputs, inputs)
    part = from_task_vectors([vector])
    assert part.rows == outputs
    assert part.total.dtype == torch.float64
    wanted = vector.T @ vector / vector.square().sum()
    torch.testing.assert_close(mean_gram(part), wanted, rtol=1e-12, atol=1e-14)
    assert float(mean_gram(part).trace()) == pytest.approx(1.0, rel=1e-12)
    torch.testing.assert_close(from_task_vectors([scale * vector]).total, part.total, rtol=1e-10, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, inputs=st.integers(1, 6), outputs=st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_maps_that_read_one_input_count_as_the_fused_map_that_they_are(
    seed: int, inputs: int, outputs: list[int]
) -> None:
    fused = draw(seed, sum(outputs), inputs)
    apart, whole = from_task_vectors(fused.split(outputs)), from_task_vectors([fused])
    assert apart.rows == whole.rows == sum(outputs)
    torch.testing.assert_close(apart.total, whole.total, rtol=1e-10, atol=1e-12)


def test_a_gradient_step_leaves_the_span_of_its_inputs_in_the_estimate() -> None:
    inputs, errors = draw(1, 5, 12), draw(2, 5, 7)
    estimate = mean_gram(from_task_vectors([-0.1 * errors.T @ inputs]))
    inside = torch.linalg.qr(inputs.T).Q
    outside = torch.eye(12, dtype=torch.float64) - inside @ inside.T
    assert float((estimate @ outside).norm()) < 1e-12
    assert int((torch.linalg.eigvalsh(estimate) > 1e-12).sum()) == 5


def test_an_expert_that_equals_the_base_has_a_zero_estimate() -> None:
    part = from_task_vectors([torch.zeros(3, 4), torch.zeros(2, 4)])
    assert torch.equal(part.total, torch.zeros(4, 4, dtype=torch.float64))
    assert part.rows == 5


def test_what_is_no_task_vector_of_one_input_is_refused() -> None:
    with pytest.raises(BMMError, match="of no task vectors"):
        from_task_vectors([])
    with pytest.raises(BMMError, match=r"\(3, 5\) does not read"):
        from_task_vectors([torch.ones(3, 4), torch.ones(3, 5)])
    with pytest.raises(BMMError, match="not finite"):
        from_task_vectors([torch.tensor([[1.0, torch.nan]])])


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, size=st.integers(1, 8), rows=st.integers(1, 50), rho=st.floats(0, 1))
def test_a_blend_keeps_the_trace_and_is_either_source_at_its_ends(seed: int, size: int, rows: int, rho: float) -> None:
    inputs = 3 * draw(seed, rows, size)
    activations, vectors = GramSum(inputs.T @ inputs, rows), from_task_vectors([draw(seed + 1, 9, size)])
    found = blend(activations, vectors, rho)
    G, E = mean_gram(activations), mean_gram(vectors)
    wanted = G.trace() * (rho * G / G.trace() + (1 - rho) * E / E.trace())
    assert found.rows == rows
    torch.testing.assert_close(mean_gram(found), wanted, rtol=1e-10, atol=1e-12)
    assert float(found.total.trace()) == pytest.approx(float(activations.total.trace()), rel=1e-10)
    torch.testing.assert_close(blend(activations, vectors, 1.0).total, activations.total)
    torch.testing.assert_close(mean_gram(blend(activations, vectors, 0.0)), G.trace() * E)


def test_where_the_task_vectors_are_silent_the_activations_stand_alone() -> None:
    activations = GramSum(torch.eye(3, dtype=torch.float64), 4)
    silent = from_task_vectors([torch.zeros(2, 3)])
    assert torch.equal(blend(activations, silent, 0.2).total, activations.total)


def test_a_blend_of_what_does_not_fit_is_refused() -> None:
    part = GramSum(torch.eye(3, dtype=torch.float64), 1)
    with pytest.raises(BMMError, match="do not fit"):
        blend(part, GramSum(torch.eye(2, dtype=torch.float64), 1), 0.5)
    with pytest.raises(BMMError, match=r"between 0 and 1, not 1\.5"):
        blend(part, part, 1.5)
