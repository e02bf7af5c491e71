"""The Gram stage's benchmark measures a merge that reads Gram matrices."""

from __future__ import annotations

from pathlib import Path

from benchmarks.scaling import gram_stage

from bmm.recipe import Recipe


def test_its_merge_collects_gram_matrices(tmp_path: Path) -> None:
    recipe = Recipe.from_yaml(gram_stage.make_experts(tmp_path, rows=8, layers=1))
    assert recipe.reads_grams
    assert len(recipe.experts) == gram_stage.EXPERTS
