"""Matrices inside parameters: methods with a rule for linear maps merge each as if it stood alone."""

from __future__ import annotations

import pytest
import torch
from pydantic import TypeAdapter

from bmm.anchors.interface import Sources
from bmm.anchors.registry import build
from bmm.anchors.settings import AnchorSettings
from bmm.anchors.task_vectors import TaskVectors
from bmm.errors import BMMError
from bmm.modules.linear import LinearMap

METHODS = ["tsv", "iso-c", "iso-cts", "wudi", "regmean", "ace"]


def map_of(name, outputs, inputs, **where):
    return LinearMap(name, outputs, inputs, name, "other", None, "held", **where)


def merged(method, weights, maps):
    """Merge one parameter whose linear maps are `maps`."""
    weights.maps = lambda _: maps

    def gram(index, module):
        size = next(map_.inputs for map_ in maps if map_.module == module)
        generator = torch.Generator().manual_seed(1000 * index + size)
        rows = torch.randn(50, size, generator=generator, dtype=torch.float64)
        return rows.T @ rows

    anchor = build(TypeAdapter(AnchorSettings).validate_python({"method": method}), Sources(gram=gram))
    anchor.prepare(weights)
    return anchor.merge("held", weights)


def parts(weights, view):
    """Return the weights of a parameter that is what `view` sees of another."""
    one = type(weights)
    return one({"held": view(weights.bases["held"])}, [{"held": view(e["held"])} for e in weights.experts])


@pytest.mark.parametrize("method", METHODS)
def test_a_transposed_matrix_is_merged_as_the_map_that_it_is(method, random_weights):
    weights = random_weights(shapes={"held": (5, 8)})
    found = merged(method, weights, [map_of("m", 8, 5, transposed=True)])
    straight = merged(method, parts(weights, lambda tensor: tensor.T.contiguous()), [map_of("m", 8, 5)])
    torch.testing.assert_close(found.tensor, straight.tensor.T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_each_matrix_of_a_stack_is_merged_alone(method, random_weights):
    weights = random_weights(shapes={"held": (3, 6, 5)})
    found = merged(method, weights, [map_of(f"m{i}", 6, 5, index=i) for i in range(3)])
    assert found.treatment == "anchored"
    for place in range(3):
        alone = merged(method, parts(weights, lambda tensor, i=place: tensor[i]), [map_of("m", 6, 5)])
        torch.testing.assert_close(found.tensor[place], alone.tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_rows_that_belong_to_no_map_are_averaged(method, random_weights):
    weights = random_weights(shapes={"held": (9, 5)})
    found = merged(method, weights, [map_of("q", 4, 5, rows=(0, 4)), map_of("v", 3, 5, rows=(6, 9))]).tensor
    for rows in (slice(0, 4), slice(6, 9)):
        size = rows.stop - rows.start
        alone = merged(method, parts(weights, lambda tensor, rows=rows: tensor[rows]), [map_of("m", size, 5)])
        torch.testing.assert_close(found[rows], alone.tensor, rtol=1e-5, atol=1e-6)
    mean = torch.stack([expert["held"] for expert in weights.experts]).mean(0)
    torch.testing.assert_close(found[4:6], mean[4:6])


@pytest.mark.parametrize("method", METHODS)
def test_matrices_that_no_expert_changed_stay_and_the_others_are_merged(method, random_weights):
    weights = random_weights(shapes={"held": (2, 6, 5)})
    for expert in weights.experts:
        expert["held"][1] = weights.bases["held"][1]
    found = merged(method, weights, [map_of(f"m{i}", 6, 5, index=i) for i in range(2)])
    assert torch.equal(found.tensor[1], weights.bases["held"][1])
    assert not torch.equal(found.tensor[0], weights.bases["held"][0])
    assert found.treatment == "anchored"


def test_a_scale_that_is_not_chosen_yet_is_refused(random_weights):
    settings = TypeAdapter(AnchorSettings).validate_python({"method": "ta", "scale": "validation"})
    with pytest.raises(BMMError, match="yet to be chosen"):
        build(settings).merge("map.weight", random_weights())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_an_expert_that_equals_the_base_gives_no_task_vector_whatever_its_dtype(dtype, random_weights):
    weights = random_weights(shapes={"held": (4, 3)})
    base = weights.bases["held"].to(torch.bfloat16)
    weights.bases["held"] = base
    weights.experts[0]["held"] = base.to(dtype)
    weights.experts[1]["held"] = base.to(dtype) + 1
    found = list(TaskVectors("held", weights))
    assert len(found) == len(weights.experts) - 1
    torch.testing.assert_close(found[0], weights.experts[1]["held"].double() - base.double(), rtol=0, atol=0)


@pytest.mark.parametrize("method", ["average", "ta", "ties", "dare", *METHODS])
def test_merging_changes_no_tensor_that_it_reads(method, random_weights):
    weights = random_weights(shapes={"held": (6, 5)})
    weights.bases["held"] = weights.bases["held"].double()
    for expert in weights.experts:
        expert["held"] = expert["held"].double()
    before = [weights.bases["held"].clone(), *(expert["held"].clone() for expert in weights.experts)]
    first = merged(method, weights, [map_of("m", 6, 5)])
    second = merged(method, weights, [map_of("m", 6, 5)])
    after = [weights.bases["held"], *(expert["held"] for expert in weights.experts)]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    assert torch.equal(first.tensor, second.tensor)
