"""Wrong inputs through the command line: exit code 2, one sentence, and nothing left behind."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.faults.conftest import Answer, Bmm, assert_no_halves, change, tree

Break = Callable[[Path], Any]
_WEIGHT = "bert.encoder.layer.0.attention.self.query.weight"


def rewrite(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Edit the tensors of a model folder in place."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    """Set keys of a model's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def data(pico: Path, split: str) -> Path:
    """The rows of one split of the second expert."""
    return pico / "data" / "task1" / f"{split}.jsonl"


def task(recipe: dict[str, Any], index: int = 1) -> dict[str, Any]:
    """The task of one expert in a recipe."""
    found: dict[str, Any] = recipe["experts"][index]["task"]
    return found


def missing_expert(pico: Path) -> None:
    """No folder where the recipe says an expert is."""
    shutil.rmtree(pico / "experts" / "task1")


def missing_base(pico: Path) -> None:
    """No folder where the recipe says the base is."""
    shutil.rmtree(pico / "base")


def other_architecture(pico: Path) -> None:
    """A RoBERTa among BERTs."""
    from transformers import AutoTokenizer, RobertaConfig, RobertaForSequenceClassification

    folder = pico / "experts" / "task1"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    shutil.rmtree(folder)
    config = RobertaConfig(
        vocab_size=65, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=2
    )
    RobertaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def other_shape(pico: Path) -> None:
    """One weight of an expert is wider."""
    rewrite(pico / "experts" / "task1", lambda tensors: tensors.update({_WEIGHT: torch.zeros(16, 24)}))


def missing_tensor(pico: Path) -> None:
    """One weight of an expert is gone."""
    rewrite(pico / "experts" / "task1", lambda tensors: tensors.pop(_WEIGHT))


def missing_head(pico: Path) -> None:
    """An expert without its classifier."""
    rewrite(pico / "experts" / "task1", lambda tensors: tensors.pop("classifier.weight"))


def extra_tensor(pico: Path) -> None:
    """An expert with an encoder weight that nobody else has."""
    more = {"bert.encoder.layer.2.output.dense.weight": torch.zeros(16, 16)}
    rewrite(pico / "experts" / "task1", lambda tensors: tensors.update(more))


def nan_weight(pico: Path) -> None:
    """NaN in a weight of an expert."""
    rewrite(pico / "experts" / "task1", lambda tensors: tensors[_WEIGHT][3].fill_(float("nan")))


def infinite_head(pico: Path) -> None:
    """Infinity in the classifier of an expert."""
    rewrite(pico / "experts" / "task1", lambda tensors: tensors["classifier.bias"].fill_(float("inf")))


def infinite_base(pico: Path) -> None:
    """Infinity in a weight of the base."""
    name = _WEIGHT.removeprefix("bert.")
    rewrite(pico / "base", lambda tensors: tensors[name][0].fill_(float("inf")))


def empty_split(pico: Path) -> None:
    """A split without rows."""
    data(pico, "calibration").write_text("")


def missing_data(pico: Path) -> None:
    """A split whose file is gone."""
    data(pico, "test").unlink()


def broken_lines(pico: Path) -> None:
    """A line that is not JSON."""
    path = data(pico, "validation")
    path.write_text(path.read_text() + '{"text": "w1 w2", "lab\n')


def missing_column(pico: Path) -> None:
    """A text column that the rows do not have."""
    change(pico, lambda recipe: task(recipe).update(text="sentence"))


def unknown_label(pico: Path) -> None:
    """A row with a class that the expert does not have."""
    path = data(pico, "test")
    path.write_text(path.read_text() + json.dumps({"text": "w1 w2 w3", "label": "perhaps"}) + "\n")


def overlap(first: str, second: str) -> Break:
    """A row of one split in another one too."""

    def give(pico: Path) -> None:
        row = data(pico, first).read_text().splitlines()[0]
        path = data(pico, second)
        path.write_text(path.read_text() + row + "\n")

    return give


def too_many_rows(pico: Path) -> None:
    """More rows asked for than there are."""
    change(pico, lambda recipe: task(recipe)["calibration"].update(rows=4000))


def unknown_key(pico: Path) -> None:
    """A misspelt key at the top of the recipe."""
    change(pico, lambda recipe: recipe.update(outputs="x"))


def unknown_nested_key(pico: Path) -> None:
    """A misspelt key further down."""
    change(pico, lambda recipe: recipe["search"].update(trails=4))


def unknown_task_key(pico: Path) -> None:
    """A misspelt key in an expert's task."""
    change(pico, lambda recipe: task(recipe).update(max_len=4))


def bad_yaml(pico: Path) -> None:
    """A bracket that never closes."""
    path = pico / "recipe.yaml"
    path.write_text(path.read_text() + "grams: {shard_rows: [\n")


def duplicate_key(pico: Path) -> None:
    """The output named twice."""
    path = pico / "recipe.yaml"
    path.write_text(path.read_text() + "output: ./elsewhere\n")


def missing_recipe(pico: Path) -> None:
    """No recipe at all."""
    (pico / "recipe.yaml").unlink()


def output_is_a_file(pico: Path) -> None:
    """A file where the output should go."""
    (pico / "merged").write_text("mine")


def foreign_output(pico: Path) -> None:
    """Somebody else's files where the output should go."""
    (pico / "merged").mkdir()
    (pico / "merged" / "thesis.tex").write_text("mine")


def output_below_a_file(pico: Path) -> None:
    """An output below a file, which not even root can write."""
    change(pico, lambda recipe: recipe.update(output="./recipe.yaml/merged"))


def output_in_proc(pico: Path) -> None:
    """An output in a file system that takes no folders, not even from root."""
    change(pico, lambda recipe: recipe.update(output="/proc/merged"))


def output_is_an_expert(pico: Path) -> None:
    """An output that is one of the inputs."""
    change(pico, lambda recipe: recipe.update(output="./experts/task1"))


def output_holds_the_recipe(pico: Path) -> None:
    """An output that has the inputs inside of it."""
    change(pico, lambda recipe: recipe.update(output="."))


def pickle(pico: Path) -> None:
    """A checkpoint that is a pickle."""
    folder = pico / "experts" / "task1"
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def truncated(pico: Path) -> None:
    """Weights of which the end is missing."""
    path = pico / "experts" / "task1" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def index_that_leads_out(pico: Path) -> None:
    """Shards of which one lies outside of the model's folder."""
    folder = pico / "experts" / "task1"
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(pico / "experts" / "stolen.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../stolen.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def remote_code(pico: Path) -> None:
    """A model that wants code of its own to be run."""
    code = pico / "experts" / "task1" / "modeling.py"
    code.write_text(f"open({str(pico / 'ran')!r}, 'w')\n")
    edit_config(code.parent, auto_map={"AutoModelForSequenceClassification": "modeling.Model"})


def one_name_twice(pico: Path) -> None:
    """Two experts of one name."""
    change(pico, lambda recipe: recipe["experts"][1].update(name="TASK0"))


def one_expert(pico: Path) -> None:
    """Nothing to merge."""
    change(pico, lambda recipe: recipe.update(experts=recipe["experts"][:1]))


def wrong_labels(pico: Path) -> None:
    """Class ids that do not count from 0."""
    edit_config(pico / "experts" / "task1", id2label={"1": "yes", "2": "no"}, label2id={"yes": 1, "no": 2})


def anchor_of_another_shape(pico: Path) -> None:
    """An anchor checkpoint that does not fit the base."""
    shutil.copytree(pico / "base", pico / "anchor")
    name = _WEIGHT.removeprefix("bert.")
    rewrite(pico / "anchor", lambda tensors: tensors.update({name: torch.zeros(16, 24)}))
    change(pico, lambda recipe: recipe.update(anchor={"method": "checkpoint", "path": "./anchor"}))


def missing_anchor(pico: Path) -> None:
    """An anchor checkpoint that is not there."""
    change(pico, lambda recipe: recipe.update(anchor={"method": "checkpoint", "path": "./nowhere"}))


def little_memory(pico: Path) -> None:
    """Workers that are allowed too little memory to load anything."""
    change(pico, lambda recipe: recipe.update(cluster={"memory_limit": "1MB"}))


def build_squeezebert(pico: Path) -> None:
    """Put a SqueezeBERT and its classifiers in the place of the BERTs."""
    from transformers import AutoTokenizer, SqueezeBertConfig, SqueezeBertForSequenceClassification, SqueezeBertModel

    config = SqueezeBertConfig(
        vocab_size=65,
        hidden_size=16,
        embedding_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        pad_token_id=0,
        num_labels=2,
        id2label={0: "yes", 1: "no"},
    )
    tokenizer = AutoTokenizer.from_pretrained(pico / "base")
    for folder in (pico / "base", *sorted((pico / "experts").iterdir())):
        shutil.rmtree(folder)
        kind = SqueezeBertModel if folder.name == "base" else SqueezeBertForSequenceClassification
        kind(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


WRONG: dict[str, tuple[Break, str]] = {
    "missing expert": (missing_expert, "experts/task1"),
    "missing base": (missing_base, "base"),
    "other architecture": (other_architecture, "task1"),
    "other shape": (other_shape, _WEIGHT.removeprefix("bert.")),
    "missing tensor": (missing_tensor, _WEIGHT.removeprefix("bert.")),
    "missing head": (missing_head, "classifier.weight"),
    "extra tensor": (extra_tensor, "encoder.layer.2.output.dense.weight"),
    "NaN weight": (nan_weight, _WEIGHT),
    "infinite head": (infinite_head, "classifier.bias"),
    "infinite base": (infinite_base, _WEIGHT.removeprefix("bert.")),
    "empty split": (empty_split, "calibration"),
    "missing data": (missing_data, "test.jsonl"),
    "broken lines": (broken_lines, "validation.jsonl"),
    "missing column": (missing_column, "'sentence'"),
    "unknown label": (unknown_label, "'perhaps'"),
    "calibration in validation": (overlap("calibration", "validation"), "calibration and validation share 1 row"),
    "validation in test": (overlap("validation", "test"), "validation and test share 1 row"),
    "too many rows": (too_many_rows, "4000 rows"),
    "unknown key": (unknown_key, "'outputs'"),
    "unknown nested key": (unknown_nested_key, "'search.trails'"),
    "unknown task key": (unknown_task_key, "task.max_len"),
    "bad YAML": (bad_yaml, "not valid YAML"),
    "duplicate key": (duplicate_key, "'output' is given twice"),
    "missing recipe": (missing_recipe, "recipe.yaml"),
    "output is a file": (output_is_a_file, "merged is a file"),
    "foreign output": (foreign_output, "merged"),
    "output below a file": (output_below_a_file, "recipe.yaml/merged"),
    "output in /proc": (output_in_proc, "/proc/merged"),
    "output is an expert": (output_is_an_expert, "the expert task1"),
    "output holds the recipe": (output_holds_the_recipe, "base_model"),
    "pickle": (pickle, "pytorch_model.bin"),
    "truncated": (truncated, "model.safetensors"),
    "index that leads out": (index_that_leads_out, "../stolen.safetensors"),
    "remote code": (remote_code, "auto_map"),
    "one name twice": (one_name_twice, "'task0'"),
    "one expert": (one_expert, "experts"),
    "wrong labels": (wrong_labels, "id2label"),
    "missing anchor": (missing_anchor, "anchor.path"),
    "little memory": (little_memory, "cluster.memory_limit"),
}


def assert_refused(answer: Answer, named: str) -> None:
    """Assert exit code 2 and one sentence, without a traceback, that names what is wrong."""
    assert answer.code == 2, answer.out + answer.err
    assert answer.out == ""
    assert len(answer.complaints) == 1, answer.err
    (line,) = answer.complaints
    assert line.startswith("bmm: ")
    assert named in line
    assert "Traceback" not in line
    assert not line.rstrip().endswith(":")


@pytest.fixture
def assert_nothing_left(small: Path, temporary: Path, tmp_path: Path) -> Callable[[dict[str, str]], None]:
    """Return a function that asserts that inputs are as they were, and that nothing new lies anywhere near them."""
    known = {"store", "temporary", "small"}

    def check(before: dict[str, str]) -> None:
        assert tree(small) == before
        assert list(temporary.iterdir()) == []
        assert {path.name for path in tmp_path.iterdir()} <= known
        assert_no_halves(tmp_path / "store")

    return check


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_input_gets_one_sentence_and_leaves_nothing(
    what: str, small: Path, tmp_path: Path, bmm: Bmm, assert_nothing_left: Callable[[dict[str, str]], None]
) -> None:
    spoil, named = WRONG[what]
    spoil(small)
    before = tree(small)
    answer = bmm("merge", small / "recipe.yaml", "--no-server", "--store", tmp_path / "store")
    assert_refused(answer, named)
    assert_nothing_left(before)


@pytest.mark.parametrize("what", ["unknown key", "NaN weight", "validation in test"])
def test_json_gets_one_document(what: str, small: Path, tmp_path: Path, bmm: Bmm) -> None:
    spoil, named = WRONG[what]
    spoil(small)
    answer = bmm("merge", small / "recipe.yaml", "--no-server", "--store", tmp_path / "store", "--json")
    assert answer.code == 2
    assert set(answer.document) == {"error", "exit_code"}
    assert answer.document["exit_code"] == 2
    assert named in answer.document["error"]
    assert "\n" not in answer.document["error"]
    assert answer.err == ""


def test_the_anchor_checkpoint_must_fit(
    small: Path, tmp_path: Path, bmm: Bmm, scheduler: str, assert_nothing_left: Callable[[dict[str, str]], None]
) -> None:
    anchor_of_another_shape(small)
    change(small, lambda recipe: recipe.update(cluster={"scheduler": scheduler}))
    before = tree(small)
    answer = bmm("merge", small / "recipe.yaml", "--no-server", "--store", tmp_path / "store")
    assert_refused(answer, _WEIGHT.removeprefix("bert."))
    assert_nothing_left(before)


def test_coverage_must_be_within_reach(
    small: Path, tmp_path: Path, bmm: Bmm, scheduler: str, assert_nothing_left: Callable[[dict[str, str]], None]
) -> None:
    # SqueezeBERT's maps are convolutions in groups, which are not regressed.
    build_squeezebert(small)
    change(small, lambda recipe: recipe.update(cluster={"scheduler": scheduler}))
    before = tree(small)
    answer = bmm("merge", small / "recipe.yaml", "--no-server", "--store", tmp_path / "store")
    assert_refused(answer, "coverage.minimum")
    assert_nothing_left(before)


def test_a_scheduler_must_answer(
    small: Path,
    tmp_path: Path,
    bmm: Bmm,
    monkeypatch: pytest.MonkeyPatch,
    assert_nothing_left: Callable[[dict[str, str]], None],
) -> None:
    monkeypatch.setattr("bmm.cluster.connection._CONNECT_SECONDS", 1)
    with socket.socket() as silent:
        # Bound but not listening: nobody else gets the port, and nobody answers at it.
        silent.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        change(small, lambda recipe: recipe.update(cluster={"scheduler": address}))
        before = tree(small)
        answer = bmm("merge", small / "recipe.yaml", "--no-server", "--store", tmp_path / "store")
    assert_refused(answer, address)
    assert_nothing_left(before)


def test_a_store_must_be_a_folder(small: Path, tmp_path: Path, bmm: Bmm) -> None:
    store = tmp_path / "store"
    store.write_text("mine")
    before = tree(tmp_path)
    answer = bmm("merge", small / "recipe.yaml", "--no-server", "--store", store)
    assert_refused(answer, str(store))
    assert tree(tmp_path) == before


def test_a_store_below_a_file_cannot_be(small: Path, tmp_path: Path, bmm: Bmm) -> None:
    store = small / "recipe.yaml" / "store"
    before = tree(tmp_path)
    answer = bmm("merge", small / "recipe.yaml", "--no-server", "--store", store)
    assert_refused(answer, str(store))
    assert tree(tmp_path) == before


@pytest.mark.parametrize("banned", ["expert", "output", "data"])
def test_allowed_folders_are_kept_to(
    banned: str, small: Path, tmp_path: Path, bmm: Bmm, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited = {"expert": small / "experts", "output": small / "merged", "data": small / "data"}
    allowed = [small / "base", small / "experts" / "task0", small / "experts" / "task2", tmp_path / "store"]
    allowed += [path for what, path in limited.items() if what != banned]
    monkeypatch.setenv("BMM_ALLOWED_FOLDERS", ":".join(map(str, allowed)))
    before = tree(small)
    answer = bmm("merge", small / "recipe.yaml", "--no-server", "--store", tmp_path / "store")
    assert_refused(answer, str(limited[banned]))
    assert tree(small) == before
    assert_no_halves(tmp_path / "store")


def test_code_of_a_model_never_runs(small: Path, tmp_path: Path, bmm: Bmm) -> None:
    remote_code(small)
    bmm("merge", small / "recipe.yaml", "--no-server", "--store", tmp_path / "store")
    assert not (small / "ran").exists()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["unknown nested key", "output below a file", "broken lines"])
def test_the_real_command_says_the_same(
    what: str, small: Path, tmp_path: Path, real_bmm: Bmm, assert_nothing_left: Callable[[dict[str, str]], None]
) -> None:
    spoil, named = WRONG[what]
    spoil(small)
    before = tree(small)
    assert_refused(real_bmm("merge", small / "recipe.yaml", "--no-server", "--store", tmp_path / "store"), named)
    assert_nothing_left(before)


@pytest.mark.slow
def test_with_the_server_a_mistake_found_inside_the_flow_reads_the_same(
    small: Path, tmp_path: Path, real_bmm: Bmm, assert_nothing_left: Callable[[dict[str, str]], None]
) -> None:
    nan_weight(small)
    before = tree(small)
    assert_refused(real_bmm("merge", small / "recipe.yaml", "--store", tmp_path / "store"), _WEIGHT)
    assert_nothing_left(before)


def test_the_recipes_of_these_tests_are_right_until_they_are_spoilt(small: Path, bmm: Bmm, tmp_path: Path) -> None:
    recipe = yaml.safe_load((small / "recipe.yaml").read_text())
    assert len(recipe["experts"]) == 3
    assert bmm("plan", small / "recipe.yaml", "--store", tmp_path / "store", "--json").code == 0
