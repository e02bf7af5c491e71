"""Half-precision experts and bases: computed as what they hold, rounded once at the end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import bmm
from bmm.recipe import Recipe

pytestmark = pytest.mark.slow
Edit = Callable[..., Path]


def recast(folder: Path, *dtypes: torch.dtype) -> None:
    """Cast a model's weights through the given dtypes, one after the other."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for dtype in dtypes:
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    save_file(tensors, file, metadata={"format": "pt"})


def merge(recipe: Path, store: str) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    merged = bmm.merge(Recipe.from_yaml(recipe), store=recipe.parent / store)
    weights = load_file(merged.output / "model.safetensors")
    return weights, json.loads((merged.output / "merge.json").read_text())


def settings(pico: Path, edit_recipe: Edit, mode: str, **more: object) -> Path:
    return edit_recipe(
        pico,
        search={"trials": 3, "per": "model"},
        evaluation={"compare": ["regmean"]},
        regression={"mode": mode},
        **more,
    )


@pytest.mark.parametrize(("dtype", "mode"), [(torch.bfloat16, "propagated"), (torch.float16, "module-wise")])
def test_a_half_precision_expert_counts_as_its_rounded_numbers(
    pico: Path, in_process: None, edit_recipe: Edit, dtype: torch.dtype, mode: str
) -> None:
    path = settings(pico, edit_recipe, mode)
    half = [pico / "experts" / name for name in ("task0", "task2")]
    for expert in half:
        recast(expert, dtype)
    found, document = merge(path, "half")
    for expert in half:
        recast(expert, torch.float32)
    wanted, compared = merge(path, "single")
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(found[name], wanted[name]), name
    assert document["metrics"] == compared["metrics"]
    assert document["methods"] == compared["methods"]
    assert document["search"] == compared["search"]


def test_a_half_precision_base_is_rounded_once_at_the_end(pico: Path, in_process: None, edit_recipe: Edit) -> None:
    half = [pico / "base", pico / "experts" / "task1"]
    for folder in half:
        recast(folder, torch.bfloat16)
    found, document = merge(settings(pico, edit_recipe, "module-wise"), "half")
    for folder in half:
        recast(folder, torch.float32)
    wanted, compared = merge(settings(pico, edit_recipe, "module-wise", dtype="bfloat16"), "single")
    assert {tensor.dtype for tensor in (*found.values(), *wanted.values())} == {torch.bfloat16}
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(found[name], wanted[name]), name
    assert document["metrics"] == compared["metrics"]
