"""Every recipe that is offered is whole: it holds offline, says what it reproduces, and is what its facts say."""

from __future__ import annotations

from pathlib import Path

import pytest

from bmm.offline import check_offline
from bmm.recipe import Recipe

DEPLOYMENTS = Path(__file__).resolve().parents[2] / "deployments"
RECIPES = sorted((DEPLOYMENTS / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_each_recipe_holds_offline(path: Path) -> None:
    recipe = Recipe.from_yaml(path)
    found = check_offline(recipe)
    # Nothing is doubtful but that no revision is pinned.
    assert [line for line in found.warnings if "without a revision" not in line] == []
    assert "0 models" not in "\n".join(found.checked)
    head = path.read_text(encoding="utf-8").partition("\nbase_model:")[0]
    assert "ublished" in head
    assert f"bmm plan --offline deployments/recipes/{path.name}" in head
    assert recipe.output == f"./merged/{path.stem}"
