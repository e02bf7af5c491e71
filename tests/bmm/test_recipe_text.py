"""The recipe's text is a recipe, and says what it was asked to say."""

from __future__ import annotations

from pathlib import Path

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from bmm.recipe import Recipe
from bmm.recipe_text import ExpertEntry, TextKeys, recipe_text

SPLITS = ("calibration", "validation", "test")


@given(
    st.lists(st.from_regex(r"[a-z][a-z0-9-]{0,12}", fullmatch=True), min_size=2, max_size=6, unique=True),
    st.integers(4, 512),
    st.sampled_from(["average", "ta", "ties", "tsv", "wudi"]),
    st.integers(1, 99),
    st.sampled_from(["data", "my data", "it's: {odd}, #1"]),
    st.sampled_from(["text", "yes", "a: b", "12"]),
)
@settings(max_examples=25, deadline=None)
def test_the_text_is_the_recipe_asked_for(
    names: list[str], max_length: int, anchor: str, trials: int, folder: str, column: str
) -> None:
    text = recipe_text(
        [
            ExpertEntry(
                name,
                f"what a {name} is",
                f"./experts/{name}",
                {part: f"{folder}/{name}/{part}.jsonl" for part in SPLITS},
                TextKeys(max_length, text=column),
            )
            for name in names
        ],
        file="recipe.yaml",
        output="./merged",
        anchor=anchor,
        trials=trials,
        seed=3,
    )
    recipe = Recipe.from_mapping(yaml.safe_load(text), folder=Path("/somewhere"))
    assert [expert.name for expert in recipe.experts] == names
    assert recipe.anchor.method == anchor
    assert (recipe.search.trials, recipe.search.seed) == (trials, 3)
    for expert in recipe.experts:
        assert recipe.resolve(expert.model) == Path("/somewhere/experts") / expert.name
        assert expert.task.max_length == max_length
        assert expert.task.text == column
        for split, source in expert.task.splits().items():
            assert source.path == "json"
            assert source.data_files == f"{folder}/{expert.name}/{split}.jsonl"
