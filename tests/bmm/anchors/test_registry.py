"""What every method must hold, whichever it is."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from bmm.anchors.interface import Sources
from bmm.anchors.registry import METHODS, build
from bmm.anchors.settings import AnchorSettings, Method
from bmm.errors import BMMError, CheckpointError

VARIANTS = [
    {"method": "average"},
    {"method": "ta"},
    {"method": "ties"},
    {"method": "ties", "scope": "tensor", "combine": "sum"},
    {"method": "dare", "drop": 0.3},
    {"method": "dare", "drop": 0.3, "then": "ties", "density": 1.0},
    {"method": "tsv"},
    {"method": "iso-c"},
    {"method": "iso-cts"},
    {"method": "wudi"},
    {"method": "wudi", "solver": "adam", "steps": 20, "learning_rate": 1e-3},
    {"method": "regmean"},
    {"method": "fisher", "floor": 1e-12},
    {"method": "ace"},
    {"method": "ace", "threshold": 0.0},
]
AVERAGED = {"average": "all", "ta": "none", "ties": "none", "dare": "none", "fisher": "none"}
"""What is averaged; by the methods that are not named here, all but linear maps."""
# The solver's steps and ACE's ridge are absolute.
SCALE_FREE = [v for v in VARIANTS if v.get("solver") != "adam" and v["method"] != "ace"]
every_variant = pytest.mark.parametrize(
    "variant", VARIANTS, ids=lambda variant: "-".join(str(value) for value in variant.values())
)


def settings_of(variant):
    return TypeAdapter(AnchorSettings).validate_python(variant)


def sources_of(weights):
    """Return statistics that follow from each expert's own weights, so that they move with it."""

    def gram(index, name):
        rows = weights.experts[index][name].double()
        return rows.T @ rows

    return Sources(gram=gram, fisher=lambda index, name: weights.experts[index][name].double().square())


def merge_all(variant, weights):
    anchor = build(settings_of(variant), sources_of(weights))
    anchor.prepare(weights)
    return {name: anchor.merge(name, weights) for name in weights.names()}


def test_every_method_of_the_recipe_is_registered():
    schema = TypeAdapter(AnchorSettings).json_schema()
    assert set(METHODS) == set(schema["discriminator"]["mapping"])


def test_every_method_has_its_name_and_a_recipe_can_say_it():
    assert set(get_args(Method)) == set(METHODS)


@pytest.mark.parametrize(
    ("variant", "needs"),
    [
        ({"method": "checkpoint", "path": "x"}, "checkpoint"),
        ({"method": "regmean"}, "gram"),
        ({"method": "fisher"}, "fisher"),
    ],
)
@pytest.mark.parametrize("sources", [None, Sources()])
def test_a_method_without_its_source_is_refused(variant, needs, sources):
    with pytest.raises(BMMError, match=f"'{variant['method']}' was built without a source of its {needs}"):
        build(settings_of(variant), sources)


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_merges_are_finite_float32_of_the_same_shape(variant, dtype, random_weights):
    weights = random_weights(dtype=dtype, size=0.5)
    for name, merged in merge_all(variant, weights).items():
        assert merged.tensor.dtype == torch.float32
        assert merged.tensor.shape == weights.base(name).shape
        assert merged.tensor.isfinite().all()
        assert not torch.equal(merged.tensor, weights.base(name).float())


@every_variant
@settings(deadline=None, max_examples=5)
@given(seed=st.integers(0, 2**31))
def test_half_precision_inputs_are_read_as_the_numbers_they_hold(variant, random_weights, weights_of, seed):
    half = random_weights(seed, dtype=torch.bfloat16, size=0.5)
    full = weights_of(
        {name: tensor.float() for name, tensor in half.bases.items()},
        [{name: tensor.float() for name, tensor in expert.items()} for expert in half.experts],
    )
    expected = merge_all(variant, full)
    for name, merged in merge_all(variant, half).items():
        assert torch.equal(merged.tensor, expected[name].tensor)


@every_variant
def test_treatments_say_what_was_done(variant, random_weights):
    for name, merged in merge_all(variant, random_weights()).items():
        rule = AVERAGED.get(variant["method"], "not linear")
        averaged = rule == "all" or (rule == "not linear" and name not in ("map.weight", "tall.weight"))
        assert merged.treatment == ("averaged" if averaged else "anchored")


@every_variant
def test_experts_equal_to_the_base_give_the_base_exactly(variant, random_weights):
    weights = random_weights().map(torch.zeros_like)
    for name, merged in merge_all(variant, weights).items():
        assert torch.equal(merged.tensor, weights.base(name))
        assert merged.treatment == "copied"


@every_variant
def test_what_is_returned_does_not_share_memory_with_the_base(variant, random_weights):
    weights = random_weights().map(torch.zeros_like)
    weights.bases["steps"] = torch.tensor([1, 2])
    for expert in weights.experts:
        expert["steps"] = torch.tensor([1, 2])
    for name, merged in merge_all(variant, weights).items():
        assert merged.tensor.data_ptr() != weights.base(name).data_ptr()


@every_variant
def test_one_expert_equal_to_the_base_gives_no_nan(variant, random_weights):
    weights = random_weights()
    weights.experts[1] = dict(weights.bases)
    for merged in merge_all(variant, weights).values():
        assert merged.tensor.isfinite().all()
        assert merged.treatment != "copied"


@every_variant
def test_integers_are_copied_in_their_own_dtype(variant, random_weights):
    weights = random_weights()
    weights.bases["steps"] = torch.tensor([[3, 4]])
    for expert in weights.experts:
        expert["steps"] = torch.tensor([[5, 6]])
    merged = merge_all(variant, weights)["steps"]
    assert merged.treatment == "copied"
    assert merged.tensor.dtype == torch.int64
    assert merged.tensor.tolist() == [[3, 4]]


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v["method"] != "dare"], ids=str)
@settings(deadline=None, max_examples=5)
@given(seed=st.integers(0, 2**31), order=st.permutations(range(4)))
def test_the_order_of_the_experts_does_not_matter(variant, random_weights, weights_of, seed, order):
    weights = random_weights(seed, experts=4)
    shuffled = weights_of(weights.bases, [weights.experts[index] for index in order])
    expected = merge_all(variant, weights)
    for name, merged in merge_all(variant, shuffled).items():
        torch.testing.assert_close(merged.tensor, expected[name].tensor, rtol=1e-5, atol=2e-5)


@every_variant
def test_the_same_inputs_give_the_same_bytes(variant, random_weights):
    first, second = (merge_all(variant, random_weights(7)) for _ in range(2))
    for name, merged in first.items():
        assert merged.tensor.numpy().tobytes() == second[name].tensor.numpy().tobytes()


@pytest.mark.parametrize(
    "variant",
    [
        {"method": "average"},
        {"method": "ta", "scale": 1.0},
        {"method": "ties", "density": 1.0},
        {"method": "dare", "drop": 0.0, "scale": 1.0},
        {"method": "dare", "drop": 0.0, "then": "ties", "density": 1.0},
        {"method": "tsv"},
        {"method": "wudi"},
        {"method": "wudi", "solver": "adam"},
        {"method": "regmean"},
        {"method": "fisher"},
    ],
    ids=str,
)
def test_one_expert_merges_to_itself(variant, random_weights):
    weights = random_weights(experts=1)
    for name, merged in merge_all(variant, weights).items():
        torch.testing.assert_close(merged.tensor, weights.experts[0][name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("variant", SCALE_FREE, ids=str)
@settings(deadline=None, max_examples=5)
@given(seed=st.integers(0, 2**31), factor=st.sampled_from([0.125, 4.0, -2.0]))
def test_scaling_the_task_vectors_scales_the_update(variant, random_weights, weights_of, seed, factor):
    weights = random_weights(seed, dtype=torch.float64)
    # A zero base keeps the final rounding to float32 relative to the update itself.
    weights = weights_of({name: torch.zeros_like(tensor) for name, tensor in weights.bases.items()}, weights.experts)
    expected = merge_all(variant, weights)
    for name, merged in merge_all(variant, weights.map(lambda vector: factor * vector)).items():
        torch.testing.assert_close(merged.tensor, factor * expected[name].tensor, rtol=1e-5, atol=1e-5)


@every_variant
def test_one_expert_tensor_is_in_memory_at_a_time(variant, random_weights):
    weights = random_weights(experts=5)
    merge_all(variant, weights)
    assert weights.most_alive == 1


@every_variant
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_tensor_that_is_not_finite_is_named(variant, bad, random_weights):
    weights = random_weights()
    weights.experts[1]["map.weight"][2, 3] = bad
    with pytest.raises(CheckpointError, match=r"'map\.weight' of expert 2 of 3"):
        merge_all(variant, weights)


@every_variant
def test_a_base_tensor_that_is_not_finite_is_named(variant, random_weights):
    weights = random_weights()
    weights.bases["map.bias"][0] = float("nan")
    with pytest.raises(CheckpointError, match=r"'map\.bias' of the base model"):
        merge_all(variant, weights)


@every_variant
def test_a_tensor_of_another_shape_is_named(variant, random_weights):
    weights = random_weights()
    weights.experts[2]["tall.weight"] = torch.zeros(9, 5)
    with pytest.raises(CheckpointError, match=r"'tall\.weight' of expert 3 of 3 has shape \(9, 5\)"):
        merge_all(variant, weights)
