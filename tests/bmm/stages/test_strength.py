from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from bmm.errors import RecipeError
from bmm.pipeline import merge
from bmm.recipe import Recipe
from bmm.regression.evidence import Evidence, most_probable
from bmm.regression.posterior import decompose, factor, residual_and_energy
from bmm.regression.settings import Rule
from bmm.report import findings
from bmm.stages.strength import check_groups, described, settings_without_search

GROUPS = {"a.query": "qkv", "a.key": "qkv", "a.dense": "attention-out"}
ENDS = (-4.0, 2.0)


def evidence(module: str) -> Evidence:
    generator = torch.Generator().manual_seed(len(module))
    anchor = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    experts = [anchor + torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(2)]
    grams = [torch.eye(4, dtype=torch.float64) * size for size in (1.0, 2.0)]
    pull, energy = residual_and_energy(anchor, experts, grams)
    return Evidence.of(factor(decompose(grams[0] + grams[1], where=module), anchor, pull), energy, 20)


def chosen(strength: Any) -> dict[str, tuple[float, float]]:
    found = settings_without_search(strength, GROUPS, evidence, {}, ENDS)
    return {group: (setting.lam, setting.gamma) for group, setting in found.items()}


def test_a_number_is_every_groups_and_numbers_are_each_ones() -> None:
    assert chosen(0.3) == {"qkv": (0.3, 1.0), "attention-out": (0.3, 1.0)}
    assert chosen({"attention-out": 2, "qkv": 0.1}) == {"qkv": (0.1, 1.0), "attention-out": (2.0, 1.0)}


def test_the_evidence_of_a_group_is_that_of_all_its_maps() -> None:
    wanted = most_probable([evidence("a.query"), evidence("a.key")], ENDS)
    assert chosen("evidence") == {
        "qkv": (wanted, 1.0),
        "attention-out": (most_probable([evidence("a.dense")], ENDS), 1.0),
    }


def test_numbers_of_other_groups_are_refused() -> None:
    check_groups("evidence", GROUPS)
    check_groups(0.1, GROUPS)
    check_groups({"qkv": 0.1, "attention-out": 0.1}, GROUPS)
    with pytest.raises(RecipeError, match="no module group 'mlp'; the groups are qkv, attention-out"):
        check_groups({"qkv": 0.1, "attention-out": 0.1, "mlp": 0.1}, GROUPS)
    with pytest.raises(RecipeError, match="the module group 'attention-out' has no number"):
        check_groups({"qkv": 0.1}, GROUPS)


def test_a_choice_is_described_in_a_word() -> None:
    assert [described(strength) for strength in ("evidence", 0.1, {"qkv": 1.0})] == ["evidence", "fixed", "fixed"]


def test_rows_held_out_choose_for_each_map_and_a_group_takes_the_geometric_mean() -> None:
    held_out = {module: 10.0**place for place, module in enumerate(GROUPS)}
    found = settings_without_search("held-out", {module: module for module in GROUPS}, evidence, held_out, ENDS)
    assert {module: setting.lam for module, setting in found.items()} == pytest.approx(held_out)
    together = settings_without_search("held-out", dict.fromkeys(GROUPS, "all"), evidence, held_out, ENDS)
    assert together["all"].lam == pytest.approx(10 ** ((len(GROUPS) - 1) / 2))


@pytest.mark.parametrize("rule", [*get_args(Rule), 0.1])
def test_every_rule_comes_out_as_a_model_whose_report_names_it(
    merged: Path, edit_recipe: Callable[..., Path], in_process: None, rule: Any
) -> None:
    search = {"trials": 3, "per": "model"} if rule == "search" else None
    recipe = Recipe.from_yaml(edit_recipe(merged, regression={"lambda": rule}, search=search))
    document = json.loads((merge(recipe, store=merged / "store").output / "merge.json").read_text(encoding="utf-8"))
    assert findings.strength_rule(document) == described(rule)
    assert "the strength of the prior" in findings.method(document)
