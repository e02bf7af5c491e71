from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from nights import found_experts
from object_server import SECRET, ObjectServer

from bmm.errors import CheckpointError, ModelAwayError, RecipeError
from bmm.recipe import Recipe
from bmm.sources import fingerprint_inputs

Edit = Callable[..., Path]


def names(path: Path) -> list[str]:
    return [expert.name for expert in Recipe.from_yaml(path).experts]


def test_found_experts_are_those_that_were_named(pico: Path) -> None:
    named = fingerprint_inputs(Recipe.from_yaml(pico / "recipe.yaml"))
    recipe = Recipe.from_yaml(found_experts(pico))
    assert fingerprint_inputs(recipe).experts == named.experts
    assert recipe.nightly is not None
    assert "nightly" not in recipe.document()
    # What a recipe was found to say says it again without looking.
    shutil.move(pico / "experts", pico / "elsewhere")
    assert Recipe.from_mapping(recipe.document(), folder=pico).experts == recipe.experts


def test_a_folder_is_an_expert_if_it_holds_a_model(pico: Path) -> None:
    path = found_experts(pico)
    (pico / "experts" / "notes").mkdir()
    (pico / "experts" / "readme.txt").write_text("no expert")
    shutil.copytree(pico / "experts" / "task0", pico / "experts" / ".hidden")
    shutil.copytree(pico / "experts" / "task0", pico / "experts" / "an older merge")
    (pico / "experts" / "an older merge" / "merge.json").write_text("{}")
    assert names(path) == ["task0", "task1", "task2"]
    shutil.copytree(pico / "experts" / "task0", pico / "experts" / "Æ new one")
    assert names(path) == ["new-one", "task0", "task1", "task2"]


def test_what_is_named_is_not_found_again(pico: Path, edit_recipe: Edit) -> None:
    found_experts(pico)
    said = yaml.safe_load((pico / "recipe.yaml").read_text())["experts"]
    path = edit_recipe(pico, experts=[*said, {**said[0], "find": "./*"}, {"name": "mine", "model": "./experts/task1"}])
    with pytest.raises(RecipeError, match="mine has none"):
        Recipe.from_yaml(path)
    mine = {"name": "mine", "model": "./experts/task1", "task": said[0]["task"]}
    recipe = Recipe.from_yaml(edit_recipe(pico, experts=[*said, {**said[0], "find": "./*"}, mine]))
    assert [expert.name for expert in recipe.experts] == ["mine", "task0", "task2"]


def test_a_task_beside_an_expert_is_its_own(pico: Path) -> None:
    path = found_experts(pico)
    own = pico / "experts" / "task1"
    shutil.move(pico / "data" / "task1", own / "rows")
    task = {
        "max_length": 12,
        **{split: {"path": "json", "data_files": f"rows/{split}.jsonl"} for split in ("calibration", "validation")},
        "test": {"path": "json", "data_files": ["rows/test.jsonl"], "rows": 20},
    }
    (own / "task.yaml").write_text(yaml.safe_dump(task))
    first, second, _ = Recipe.from_yaml(path).experts
    assert (first.task.max_length, second.task.max_length, second.task.test.rows) == (16, 12, 20)  # type: ignore[union-attr]
    assert fingerprint_inputs(Recipe.from_yaml(path)).experts[1].data["test"]["rows"] == 20
    for wrong, said in (("max_length: {}", "valid integer"), ("[", "expected"), ("tset: 3", "Extra inputs")):
        (own / "task.yaml").write_text(wrong)
        with pytest.raises(RecipeError, match=r"task.yaml is not a task") as caught:
            Recipe.from_yaml(path)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("experts", "said"),
    [
        ([{"find": "./nowhere/*"}], "nothing that fits './nowhere/\\*' holds a model"),
        ([{"find": "./experts/task0"}], "'experts': a merge needs at least 2 experts, and there is one"),
        ([{"find": "./experts/*", "tsak": 1}], "unknown key 'experts.find.tsak'"),
        ([{"find": 3}], "'experts.find.find'"),
        ([{"find": "./experts/*", "task": {"max_length": 1}}], "'experts.find.task.max_length'"),
        ([{"find": "./experts/*"}, {"find": "./experts/*"}, {"name": "task0", "model": "x"}], "given to two"),
        ([{"find": "s3://bucket/experts"}], "not of the form s3://bucket/prefix/\\*"),
        ([{"find": "s3://bucket/experts/*"}], "needs credentials"),
    ],
)
def test_a_line_that_finds_nothing_usable_is_one_sentence(
    pico: Path, edit_recipe: Edit, experts: list[dict[str, Any]], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    with pytest.raises((RecipeError, CheckpointError), match=said) as caught:
        Recipe.from_yaml(edit_recipe(pico, experts=experts))
    assert "\n" not in str(caught.value)
    assert "the store" not in str(caught.value)


@pytest.fixture
def bucket(
    object_server: ObjectServer, pico: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> tuple[ObjectServer, str]:
    """The pico experts, each with its rows and task, in a bucket."""
    for name, value in object_server.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    name = object_server.new_bucket()
    for expert in sorted((pico / "experts").iterdir()):
        put(object_server, name, expert.name, expert)
        put(object_server, name, f"{expert.name}/data", pico / "data" / expert.name)
    object_server.ask("PUT", f"{name}/team/experts/task0/pytorch_model.bin", b"a pickle")
    object_server.ask("PUT", f"{name}/team/experts/notes/readme.txt", b"no expert")
    return object_server, name


def put(server: ObjectServer, bucket: str, name: str, folder: Path) -> None:
    for file in sorted(folder.iterdir()):
        server.ask("PUT", f"{bucket}/team/experts/{name}/{file.name}", file.read_bytes())


def test_experts_in_a_bucket_are_those_of_the_folder(
    bucket: tuple[ObjectServer, str], pico: Path, edit_recipe: Edit, tmp_path: Path
) -> None:
    server, name = bucket
    named = fingerprint_inputs(Recipe.from_yaml(pico / "recipe.yaml"))
    splits = {
        split: {"path": "json", "data_files": f"{{folder}}/data/{split}.jsonl"}
        for split in ("calibration", "validation", "test")
    }
    task = {"kind": "text-classification", "max_length": 16, **splits}
    path = edit_recipe(pico, experts=[{"find": f"s3://{name}/team/experts/*", "task": task}])
    first = fingerprint_inputs(Recipe.from_yaml(path))
    assert [one.model.digest for one in first.experts] == [one.model.digest for one in named.experts]
    assert [one.data for one in first.experts] == [one.data for one in named.experts]
    assert not list((tmp_path / "cache").rglob("*.bin"))
    # Nothing is fetched twice, and one that changed alone.
    fetched = {file: file.stat().st_ino for file in (tmp_path / "cache").rglob("model.safetensors")}
    put(server, name, "task1", pico / "experts" / "task2")
    second = fingerprint_inputs(Recipe.from_yaml(path))
    assert [one.model.digest for one in second.experts] == [named.experts[index].model.digest for index in (0, 2, 2)]
    assert [
        one.model.revision == other.model.revision for one, other in zip(first.experts, second.experts, strict=True)
    ] == [True, False, True]
    again = {file: file.stat().st_ino for file in (tmp_path / "cache").rglob("model.safetensors")}
    assert fetched.items() <= again.items()
    assert len(again) == len(fetched) + 1
    # A state that is gone from the bucket is found on this machine, and nowhere else.
    recipe = Recipe.from_mapping(
        {
            **Recipe.from_yaml(path).document(),
            "experts": [
                {**expert.model_dump(mode="json"), "model": model.model.source}
                for expert, model in zip(Recipe.from_yaml(path).experts, first.experts, strict=True)
            ],
        },
        folder=pico,
    )
    assert [one.model for one in fingerprint_inputs(recipe).experts] == [one.model for one in first.experts]
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(CheckpointError, match="was replaced in the bucket meanwhile"):
        fingerprint_inputs(recipe)
    one = {"name": "one", "model": f"s3://{name}/team/experts/task0", "task": None}
    gone = {"name": "two", "model": f"s3://{name}/team/experts/task9", "task": None}
    with pytest.raises(CheckpointError, match="there is nothing at that address"):
        fingerprint_inputs(
            Recipe.from_yaml(edit_recipe(pico, experts=[one, gone], evaluation=None, search=None, grams=None))
        )


def test_a_bucket_that_does_not_answer_says_nothing_of_the_expert(
    pico: Path, edit_recipe: Edit, object_server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in object_server.environment(port=9).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("bmm.stores.bucket.Bucket.__init__.__kwdefaults__", {"patience": 0.1})
    with pytest.raises(ModelAwayError, match="has not answered") as caught:
        Recipe.from_yaml(edit_recipe(pico, experts=[{"find": "s3://bucket/experts/*"}]))
    assert SECRET not in str(caught.value)
