from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bmm.anchors.settings import WUDISettings
from bmm.anchors.wudi import WUDI

SHAPES = {"map.weight": (7, 5)}
WIDE = {"map.weight": (3, 11)}


def objective(merged, vectors):
    """`Σ ‖(M − τ) τᵀ‖² / ‖τ‖²` with the products as the paper writes them, for autograd."""
    return sum(((merged - vector) @ vector.T).square().sum() / vector.square().sum() for vector in vectors)


def exact(weights, cutoff=1e-10):
    """The update before it is rounded to float32: a zero base loses nothing that matters."""
    return WUDI(WUDISettings(cutoff=cutoff)).merge("map.weight", weights).tensor.double()


def tensors(arrays):
    return [torch.from_numpy(array) for array in arrays]


@pytest.mark.parametrize("cutoff", [1e-10, 1e-3])
@pytest.mark.parametrize("shapes", [SHAPES, WIDE], ids=["tall", "wide"])
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31), experts=st.integers(1, 3))
def test_the_exact_minimiser_is_a_least_squares_solution(
    shapes, cutoff, random_weights, weights_of, task_vectors_of, seed, experts
):
    drawn = random_weights(seed, experts, shapes=shapes)
    vectors = task_vectors_of(drawn, "map.weight")
    stacked = np.vstack([vector / np.linalg.norm(vector) for vector in vectors])
    targets = np.vstack([vector @ vector.T / np.linalg.norm(vector) for vector in vectors])
    singular = np.linalg.svd(stacked, compute_uv=False)
    # A singular value at the cutoff itself falls to either side by rounding.
    assume(not np.any(np.isclose(singular, np.sqrt(cutoff) * singular[0], rtol=1e-3)))
    expected, *_ = scipy.linalg.lstsq(stacked, targets, cond=np.sqrt(cutoff))
    weights = weights_of(
        {"map.weight": torch.zeros(shapes["map.weight"], dtype=torch.float64)},
        [{"map.weight": vector} for vector in tensors(vectors)],
    )
    np.testing.assert_allclose(exact(weights, cutoff), expected.T, rtol=1e-4, atol=1e-6 * np.abs(expected).max())


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31), experts=st.integers(2, 4))
def test_the_objective_is_flat_at_the_minimiser_and_higher_around_it(random_weights, task_vectors_of, seed, experts):
    weights = random_weights(seed, experts, shapes=SHAPES)
    vectors = tensors(task_vectors_of(weights, "map.weight"))
    found = (exact(weights) - weights.bases["map.weight"].double()).requires_grad_()
    value = objective(found, vectors)
    (gradient,) = torch.autograd.grad(value, found)
    at_sum = sum(vectors).requires_grad_()
    (reference,) = torch.autograd.grad(objective(at_sum, vectors), at_sum)
    assert gradient.norm() < 1e-4 * reference.norm()
    for seed_of_step in range(3):
        step = torch.randn(found.shape, generator=torch.Generator().manual_seed(seed_of_step), dtype=found.dtype)
        assert objective(found.detach() + 1e-3 * step, vectors) > value


def test_rounding_of_low_rank_experts_is_not_blown_up(random_weights, weights_of):
    draws = random_weights(shapes={f"{side}{index}": (40, 2) for side in "ab" for index in range(3)}).bases
    base = random_weights(5, shapes={"map.weight": (40, 40)}).bases
    clean = [0.1 * draws[f"a{index}"].double() @ draws[f"b{index}"].double().T for index in range(3)]
    zero = {"map.weight": torch.zeros(40, 40, dtype=torch.float64)}
    expected = exact(weights_of(zero, [{"map.weight": vector} for vector in clean]))
    stored = [{"map.weight": (base["map.weight"].double() + vector).float()} for vector in clean]
    found = exact(weights_of(base, stored)) - base["map.weight"].double()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_adam_follows_the_published_schedule(random_weights, task_vectors_of):
    weights = random_weights(shapes=SHAPES)
    vectors = tensors(task_vectors_of(weights, "map.weight"))
    point = torch.nn.Parameter(sum(vectors))
    optimizer = torch.optim.Adam([point], lr=1e-5)
    for _ in range(300):
        optimizer.zero_grad()
        objective(point, vectors).backward()
        optimizer.step()
    merged = WUDI(WUDISettings(solver="adam")).merge("map.weight", weights).tensor
    expected = weights.bases["map.weight"].double() + point.detach()
    torch.testing.assert_close(merged, expected.float(), rtol=1e-6, atol=1e-7)


def test_a_long_adam_run_gets_to_the_exact_minimiser(random_weights, task_vectors_of):
    weights = random_weights(shapes=SHAPES, size=1.0)
    vectors = tensors(task_vectors_of(weights, "map.weight"))
    base = weights.bases["map.weight"].double()
    long = WUDI(WUDISettings(solver="adam", steps=3000, learning_rate=1e-2)).merge("map.weight", weights)
    least, start = objective(exact(weights) - base, vectors), objective(sum(vectors), vectors)
    assert objective(long.tensor.double() - base, vectors) - least < 1e-6 * (start - least)


def test_what_is_not_a_linear_map_is_averaged(random_weights, task_vectors_of):
    weights = random_weights()
    for name in ("map.bias", "embedding.weight"):
        expected = weights.bases[name].double().numpy() + np.mean(task_vectors_of(weights, name), axis=0)
        merged = WUDI(WUDISettings()).merge(name, weights)
        np.testing.assert_allclose(merged.tensor.numpy(), expected, rtol=1e-6, atol=1e-7)


def test_experts_on_orthogonal_inputs_all_survive_whole(weights_of):
    vectors = [torch.zeros(4, 6) for _ in range(3)]
    for index, vector in enumerate(vectors):
        vector[:, 2 * index : 2 * index + 2] = torch.randn(4, 2, generator=torch.Generator().manual_seed(index))
    weights = weights_of({"map.weight": torch.zeros(4, 6)}, [{"map.weight": vector} for vector in vectors])
    torch.testing.assert_close(exact(weights).float(), sum(vectors))


def test_a_solver_depends_on_its_own_settings_alone():
    assert (
        WUDISettings(steps=5).said() == WUDISettings().said() == {"method": "wudi", "solver": "exact", "cutoff": 1e-3}
    )
    assert WUDISettings(solver="adam", cutoff=0.1).said() == WUDISettings(solver="adam").said()
    assert WUDISettings(solver="adam", steps=5).said() != WUDISettings(solver="adam").said()
