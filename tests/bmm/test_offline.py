from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from bmm.errors import CheckpointError, DataError, RecipeError, UserError
from bmm.kinds.settings import SplitSource
from bmm.offline import Findings, check_offline, disjoint
from bmm.recipe import Recipe

Change = Callable[[dict[str, Any]], None]
ROWS = 40


def hub_recipe(folder: Path, change: Change | None = None) -> Recipe:
    """Write and read a recipe of two experts on a hub."""
    data = {"path": "owner/rows", "split": "train", "rows": 8}
    task = {
        "calibration": data,
        "validation": {**data, "skip": 8},
        "test": {"path": "owner/rows", "split": "test"},
    }
    value = {
        "base_model": "owner/base@v1",
        "experts": [{"name": name, "model": f"owner/{name}", "task": {**task}} for name in ("one", "two")],
        "output": "./merged",
    }
    if change:
        change(value)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(value, sort_keys=False), encoding="utf-8")
    return Recipe.from_yaml(path)


def check(folder: Path, change: Change | None = None) -> Findings:
    return check_offline(hub_recipe(folder, change))


def test_a_recipe_on_the_hub_holds_and_what_is_open_is_said(tmp_path: Path) -> None:
    found = check(tmp_path)
    text = "\n".join(found.checked)
    assert "2 experts" in text
    assert "3 models and 6 splits: 3 models and 6 splits on a hub" in text
    assert [
        line for line in found.warnings if "without a revision" in line and "owner/one, owner/two, owner/rows" in line
    ]
    assert any("hub's models exist" in line for line in found.not_checked)
    assert any("hub's data sets" in line for line in found.not_checked)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "recipe.yaml"]


def test_local_folders_and_files_are_looked_for_and_nothing_else_is(pico: Path) -> None:
    found = check_offline(Recipe.from_yaml(pico / "recipe.yaml"))
    assert "0 models and 0 splits on a hub" in "\n".join(found.checked)
    assert found.warnings == ()
    assert not any("hub" in line for line in found.not_checked)
    (pico / "data" / "task1" / "test.jsonl").unlink()
    with pytest.raises(DataError, match=r"the expert task1, test .*there is no file"):
        check_offline(Recipe.from_yaml(pico / "recipe.yaml"))
    (pico / "base" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"base_model: .*base has no config.json"):
        check_offline(Recipe.from_yaml(pico / "recipe.yaml"))


def expert(key: str, value: Any) -> Change:
    return lambda recipe: recipe["experts"][1].update({key: value})


def split(name: str, **value: Any) -> Change:
    return lambda recipe: recipe["experts"][1]["task"].update({name: value})


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (expert("model", "./nowhere"), CheckpointError, r"the expert two: there is no folder .*nowhere.*hub id"),
        (expert("model", "recipe.yaml"), CheckpointError, r"the expert two: .*recipe.yaml is a file"),
        (expert("model", "owner/a--b"), CheckpointError, r"the expert two: 'owner/a--b' has '--' in it"),
        (split("test", path="glue"), DataError, r"the expert two, test .*`path` is 'glue'.*hub id"),
        (split("test", path="owner/rows@v1"), DataError, r"`path` is 'owner/rows@v1'"),
        (split("test", path="owner/a..b"), DataError, r"the data set 'owner/a..b' has '..' in it"),
        (
            split("validation", path="owner/rows", rows=9, skip=7),
            DataError,
            "the expert two: calibration and validation",
        ),
        (split("test", path="owner/rows"), DataError, "the expert two: calibration and test are taken from the same"),
        (lambda recipe: recipe.update(output="."), RecipeError, "'output'"),
        (expert("name", "one"), RecipeError, "'one' is given to two experts"),
        (split("test", path="owner/rows", splt="test"), RecipeError, r"unknown key 'experts.1.task.test.splt'"),
    ],
)
def test_what_a_merge_would_refuse_is_refused(
    tmp_path: Path, change: Change, error: type[UserError], said: str
) -> None:
    if "output" in said:
        (tmp_path / "somebody.txt").write_text("else's")
    with pytest.raises(error, match=said):
        check(tmp_path, change)


def test_a_model_named_twice_and_orders_of_two_seeds_are_doubtful(tmp_path: Path) -> None:
    found = check(tmp_path, expert("model", "owner/one"))
    assert any("the expert one and the expert two are the same model, owner/one" in line for line in found.warnings)
    found = check(tmp_path, split("validation", path="owner/rows", rows=8, seed=1))
    assert any("the expert two: whether calibration and validation share rows" in line for line in found.warnings)


SLICES = st.tuples(st.integers(0, ROWS), st.integers(0, ROWS)).map(lambda ends: f"train[{min(ends)}:{max(ends)}]")
SPLITS = st.one_of(
    st.sampled_from(["train", "test", "train[:20]", "train[20:]", "train[:50%]", "train[50%:]", "train[-5:]"]), SLICES
)
SOURCES = st.builds(
    SplitSource,
    path=st.just("owner/rows"),
    split=SPLITS,
    rows=st.one_of(st.none(), st.integers(1, 12)),
    seed=st.integers(0, 1),
    skip=st.integers(0, 12),
)


def rows_of(source: SplitSource) -> set[tuple[str, int]]:
    """Return the rows that a source takes of a table of 40 in `train` and in `test`, as `datasets` would."""
    from bmm.evaluation.data import _sample

    name, _, bounds = source.split.partition("[")
    rows = list(range(ROWS))
    if bounds:
        start, stop = (
            None if not end else int(end.rstrip("%")) * ROWS // 100 if end.endswith("%") else int(end)
            for end in bounds.rstrip("]").split(":")
        )
        rows = rows[start:stop]
    return {(name, rows[index]) for index in _sample(len(rows), source, "")}


@given(SOURCES, SOURCES)
@settings(max_examples=200, deadline=None)
def test_what_is_called_apart_shares_no_row_and_what_is_called_shared_does(
    first: SplitSource, second: SplitSource
) -> None:
    verdict = disjoint(first, second)
    assert verdict == disjoint(second, first)
    try:
        shared = rows_of(first) & rows_of(second)
    except DataError:
        return  # One asks for more rows than there are.
    assert verdict is None or verdict == (not shared)


def test_other_data_and_other_files_are_apart() -> None:
    one = SplitSource(path="json", data_files="a.jsonl")
    assert disjoint(one, SplitSource(path="json", data_files="b.jsonl")) is True
    assert disjoint(one, SplitSource(path="json", data_files=["a.jsonl"])) is False
    assert disjoint(one, SplitSource(path="owner/rows")) is True
    mixed = SplitSource(path="owner/rows", split="train[:5]+train[9:]")
    assert disjoint(mixed, SplitSource(path="owner/rows", split="train[5:9]")) is None
    assert disjoint(mixed, mixed) is False


def test_checking_loads_neither_torch_nor_datasets(tmp_path: Path) -> None:
    hub_recipe(tmp_path)
    program = (
        "import sys; from bmm.recipe import Recipe; from bmm.offline import check_offline; "
        f"check_offline(Recipe.from_yaml({str(tmp_path / 'recipe.yaml')!r})); "
        "sys.exit(bool({'torch', 'datasets', 'transformers'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_experts_without_tasks_hold_too(tmp_path: Path) -> None:
    def change(recipe: dict[str, Any]) -> None:
        for entry in recipe["experts"]:
            del entry["task"]

    found = check(tmp_path, change)
    assert any("2 without a task" in line for line in found.checked)
    assert any("what kind of task" in line for line in found.not_checked)
    assert not any("rows" in line for line in found.not_checked)
