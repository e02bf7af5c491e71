from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bmm.errors import CheckpointError, DataError, OutputError, RecipeError, UserError
from bmm.evaluation.data import source_files
from bmm.kinds.settings import SplitSource
from bmm.recipe import Recipe
from bmm.sources import check_output, fingerprint_inputs, fingerprint_model

Edit = Callable[..., Path]


def test_everything_is_found_and_known_by_its_bytes(pico: Path, tmp_path: Path) -> None:
    found = fingerprint_inputs(Recipe.from_yaml(pico / "recipe.yaml"))
    assert [expert.name for expert in found.experts] == ["task0", "task1", "task2"]
    assert len({found.base.digest, *(expert.model.digest for expert in found.experts)}) == 4
    assert found.anchor is None
    assert not (pico / "merged").exists()
    assert not [path for path in pico.iterdir() if path.name.startswith(".")]
    moved = tmp_path / "moved"
    shutil.copytree(pico, moved)
    again = fingerprint_inputs(Recipe.from_yaml(moved / "recipe.yaml"))
    assert again.base.digest == found.base.digest
    assert [expert.data for expert in again.experts] == [expert.data for expert in found.experts]
    assert again.base.path != found.base.path


@pytest.mark.parametrize("large", [False, True])
def test_torch_is_imported_while_large_models_are_read_alone(pico: Path, large: bool) -> None:
    code = f"""
import sys
from pathlib import Path
from bmm import sources
from bmm.checkpoint import verified
from bmm.recipe import Recipe
if {large}:
    verified._WORTH_THREADS = sources._WORTH_IMPORTING = 0
found = sources.fingerprint_inputs(Recipe.from_yaml(Path(sys.argv[1])))
print("torch" in sys.modules, found.base.digest, *(expert.model.digest for expert in found.experts))
"""
    said = subprocess.run(
        [sys.executable, "-c", code, str(pico / "recipe.yaml")], check=True, capture_output=True, text=True
    )
    inputs = fingerprint_inputs(Recipe.from_yaml(pico / "recipe.yaml"))
    digests = [inputs.base.digest, *(expert.model.digest for expert in inputs.experts)]
    assert said.stdout.split() == [str(large), *digests]


def test_one_byte_of_one_file_changes_what_it_belongs_to_alone(pico: Path) -> None:
    recipe = Recipe.from_yaml(pico / "recipe.yaml")
    before = fingerprint_inputs(recipe)
    file = pico / "data" / "task1" / "test.jsonl"
    file.write_text(file.read_text().replace('"yes"', '"no"', 1))
    weights = pico / "experts" / "task2" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    after = fingerprint_inputs(recipe)
    assert after.base == before.base
    assert after.experts[0] == before.experts[0]
    assert after.experts[1].model == before.experts[1].model
    changed = [name for name in after.experts[1].data if after.experts[1].data[name] != before.experts[1].data[name]]
    assert changed == ["test"]
    assert after.experts[2].model.digest != before.experts[2].model.digest


def test_the_same_rows_under_another_name_are_the_same_data(pico: Path) -> None:
    path = pico / "recipe.yaml"
    before = fingerprint_inputs(Recipe.from_yaml(path))
    (pico / "data" / "task1" / "test.jsonl").rename(pico / "elsewhere.json")
    path.write_text(path.read_text().replace("data/task1/test.jsonl", "elsewhere.json"))
    assert fingerprint_inputs(Recipe.from_yaml(path)).experts == before.experts


def test_an_anchor_checkpoint_is_fingerprinted_too(pico: Path, edit_recipe: Edit) -> None:
    path = edit_recipe(pico, anchor={"method": "checkpoint", "path": "./experts/task0"})
    found = fingerprint_inputs(Recipe.from_yaml(path))
    assert found.anchor is not None
    assert found.anchor.digest == found.experts[0].model.digest


@pytest.mark.parametrize("output", [".", "..", "./base", "./experts", "./experts/task1", "./merged/../base"])
def test_an_output_that_holds_an_input_is_refused(pico: Path, edit_recipe: Edit, output: str) -> None:
    recipe = Recipe.from_yaml(edit_recipe(pico, output=output))
    with pytest.raises(RecipeError, match=r"'output': .* holds (base_model|the expert task\d)"):
        check_output(recipe)


def test_an_output_that_holds_its_own_anchor_is_refused(pico: Path, edit_recipe: Edit) -> None:
    shutil.copytree(pico / "base", pico / "merged")
    (pico / "merged" / "merge.json").write_text("{}")
    path = edit_recipe(pico, anchor={"method": "checkpoint", "path": "./merged"})
    with pytest.raises(RecipeError, match="holds the anchor"):
        fingerprint_inputs(Recipe.from_yaml(path))
    assert fingerprint_inputs(Recipe.from_yaml(path), check_output_folder=False).anchor is not None


def test_an_output_that_is_somebody_elses_is_refused(pico: Path, edit_recipe: Edit) -> None:
    with pytest.raises(OutputError, match=r"not a folder this project wrote"):
        check_output(Recipe.from_yaml(edit_recipe(pico, output="./data")))
    with pytest.raises(OutputError, match="is a file"):
        check_output(Recipe.from_yaml(edit_recipe(pico, output="./recipe.yaml")))
    with pytest.raises(OutputError):
        check_output(Recipe.from_yaml(edit_recipe(pico, output="./recipe.yaml/merged")))


def test_what_is_missing_is_named_with_its_key(pico: Path) -> None:
    recipe = Recipe.from_yaml(pico / "recipe.yaml")
    (pico / "data" / "task2" / "validation.jsonl").rename(pico / "gone")
    with pytest.raises(DataError, match=r"the expert task2, validation.*validation\.jsonl"):
        fingerprint_inputs(recipe)
    shutil.rmtree(pico / "experts" / "task1")
    with pytest.raises(CheckpointError, match="the expert task1: there is no folder"):
        fingerprint_inputs(recipe)
    shutil.rmtree(pico / "base")
    with pytest.raises(CheckpointError, match="base_model: there is no folder"):
        fingerprint_inputs(recipe)


@pytest.mark.parametrize("what", ["output", "data", "model"])
def test_what_lies_outside_of_the_allowed_folders_is_refused(
    pico: Path, tmp_path: Path, edit_recipe: Edit, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setenv("BMM_ALLOWED_FOLDERS", str(pico))
    outside = tmp_path / "outside"
    if what == "output":
        edit_recipe(pico, output=str(outside))
    elif what == "data":
        file = pico / "data" / "task0" / "test.jsonl"
        file.rename(outside)
        os.symlink(outside, file)
    else:
        shutil.move(pico / "base", outside)
        os.symlink(outside, pico / "base")
    with pytest.raises(UserError, match="outside of the allowed folders"):
        fingerprint_inputs(Recipe.from_yaml(pico / "recipe.yaml"))


def test_rows_outside_of_the_allowed_folders_are_not_opened_to_see_what_they_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "rows.jsonl"
    inside.mkdir()
    outside.write_text("this is no JSON, and not to be quoted")
    monkeypatch.setenv("BMM_ALLOWED_FOLDERS", str(inside))
    with pytest.raises(UserError, match=r"rows\.jsonl lies outside of the allowed folders"):
        source_files(SplitSource(path="json", data_files=str(outside)), inside, named="image")


def test_a_model_is_found_from_the_folder_given(pico: Path) -> None:
    model = fingerprint_model("./experts/task0", pico, "MODEL")
    assert (model.source, model.path, model.revision) == ("./experts/task0", str(pico / "experts" / "task0"), None)
    with pytest.raises(CheckpointError, match=r"^MODEL"):
        fingerprint_model("./experts/none", pico, "MODEL")
