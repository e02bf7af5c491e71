"""Tasks of lm-evaluation-harness: scored as the package itself scores them, and nothing of a task's file is run."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.utils import logging

import bmm
from bmm.checkpoint.reader import Checkpoint
from bmm.errors import CheckpointError, DataError, RecipeError, UserError
from bmm.evaluation.metrics import Measured
from bmm.kinds.lm_eval import LmEvalKind
from bmm.kinds.lm_eval_file import TaskFile
from bmm.kinds.settings import LmEval, asking, reading
from bmm.sources import fingerprint_inputs
from bmm.store import Store

logging.disable_progress_bar()

KIND = LmEvalKind()
WORDS = 12
CHOICE: dict[str, Any] = {
    "task": "count_on",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"train": "train.jsonl", "validation": ["held.jsonl"], "test": "test.jsonl"}},
    "training_split": "train",
    "validation_split": "validation",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{ask | trim}} :",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}
SAY = {key: value for key, value in CHOICE.items() if key != "doc_to_choice"} | {
    "output_type": "generate_until",
    "doc_to_target": "{{choices[gold]}}",
    "generation_kwargs": {"until": ["w11"], "max_gen_toks": 3, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "ignore_case": True}],
    "filter_list": [
        {"name": "whole", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]},
        {"name": "first", "filter": [{"function": "regex", "regex_pattern": r"(w\d+)"}, {"function": "take_first"}]},
    ],
}


def documents(step: int) -> list[dict[str, Any]]:
    """Words that count on by a step, with three continuations of different lengths to choose from."""
    generator = random.Random(step)
    made = []
    for first in range(WORDS):
        for length in range(2, 8):
            words = [f"w{(first + step * place) % WORDS}" for place in range(length + 2)]
            wrong = [
                " ".join(f"w{generator.randrange(WORDS)}" for _ in range(generator.randint(1, 3))) for _ in range(2)
            ]
            choices = [" ".join(words[length : length + 1 + first % 2]), *wrong]
            order = generator.sample(range(3), 3)
            made.append(
                {
                    "ask": " ".join(words[:length]) + "  ",
                    "choices": [choices[place] for place in order],
                    "gold": order.index(0),
                    "whole": " ".join(words),
                }
            )
    generator.shuffle(made)
    return made


def write_task(folder: Path, config: dict[str, Any], step: int = 1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = documents(step)
    cuts = {"train.jsonl": rows[:30], "held.jsonl": rows[30:50], "test.jsonl": rows[50:]}
    for name, some in cuts.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in some))
    (folder / "task.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return folder / "task.yaml"


def save_model(folder: Path, family: str) -> None:
    torch.manual_seed(0)
    ends = {"eos_token_id": WORDS, "bos_token_id": WORDS, "vocab_size": WORDS + 2}
    if family == "gpt2":
        config = transformers.GPT2Config(**ends, n_positions=24, n_embd=16, n_layer=2, n_head=2, initializer_range=0.2)
    else:
        shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        config = transformers.LlamaConfig(**shape, **ends, max_position_embeddings=96, initializer_range=0.5)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    save_tokenizer(folder)


def save_tokenizer(folder: Path) -> None:
    """Save a tokenizer of whole words that has an end but no padding."""
    vocabulary = {**{f"w{index}": index for index in range(WORDS)}, "[END]": WORDS, ":": WORDS + 1}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[END]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[END]").save_pretrained(folder)


def harness_scores(
    model: Path, file: Path, metric: str, samples: list[int] | None, monkeypatch: pytest.MonkeyPatch, **said: Any
) -> tuple[float, list[Any]]:
    """Return what `simple_evaluate` says of a checkpoint on a task's test split, and of each of its documents."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(file.parent)
    name = yaml.safe_load(file.read_text())["task"]
    target = transformers.AutoModelForCausalLM.from_pretrained(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    found: Any = simple_evaluate(
        model=HFLM(pretrained=target, tokenizer=tokenizer, batch_size=4),
        tasks=[name],
        task_manager=TaskManager(include_path=str(file.parent), include_defaults=False),
        samples={name: samples} if samples else None,
        bootstrap_iters=0,
        **said,
    )
    key, _, kept = metric.partition(",")
    each = [one[key] for one in found["samples"][name] if one["filter"] == (kept or "none")]
    return found["results"][name][f"{key},{kept or 'none'}"], each


def measure(model: Path, file: Path, **said: Any) -> tuple[Measured, Any]:
    """Return what this project says of the same: the metric over the test split, and its rows."""
    task = LmEval(kind="lm-eval", file=str(file), **said)
    split = KIND.load_split(task.splits()["test"], task, (), file.parent, "the expert a, test")
    split = split.from_jsonl("again", split.to_jsonl(), KIND.row)
    told = {"kind": "lm-eval", "max_length": task.max_length, **TaskFile.read(file).asked(task)}
    with Checkpoint.open(model) as checkpoint:
        built = KIND.build(checkpoint.config, model, {**reading(told), **asking(told)}, 5, "a")
        built.load_head({})
        built.load_encoder({name: checkpoint.tensor(name) for name in checkpoint.names()})
    metric = KIND.metric(told["metric"], ())
    answers = built.logits(built.prepare(split.rows))
    return Measured(metric, metric.statistics(answers, [row.label for row in split.rows])), split.rows


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "accuracy": ("gpt2", CHOICE, {}, "acc"),
    "normed, with examples": ("llama", {**CHOICE, "fewshot_split": "train", "num_fewshot": 2}, {}, "acc_norm"),
    "mutual information": ("llama", {**CHOICE, "metric_list": [{"metric": "acc_mutual_info"}]}, {}, "acc_mutual_info"),
    "several prompts": (
        "llama",
        {**CHOICE, "doc_to_text": "gold", "doc_to_choice": "choices", "doc_to_target": "{{whole}}"},
        {},
        "acc",
    ),
    "generated": ("gpt2", SAY, {"filter": "first"}, "exact_match,first"),
    "generated, with listed examples": (
        "llama",
        SAY | {"fewshot_config": {"samples": documents(3)[:2], "sampler": "first_n"}, "num_fewshot": 2},
        {},
        "exact_match,whole",
    ),
    "likelihood": (
        "llama",
        {
            **{
                key: value
                for key, value in SAY.items()
                if key not in ("generation_kwargs", "metric_list", "filter_list")
            },
            "output_type": "loglikelihood",
            "doc_to_target": "{{ ' ' ~ choices[gold] }}",
        },
        {"metric": "perplexity"},
        "perplexity",
    ),
    "text": (
        "gpt2",
        {
            **{key: value for key, value in CHOICE.items() if key not in ("doc_to_choice", "metric_list")},
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "whole",
        },
        {},
        "word_perplexity",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_of_the_package(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family, config, said, metric = CASES[case]
    save_model(tmp_path / "model", family)
    if config["output_type"] == "generate_until":
        train(tmp_path / "model", tmp_path / "model", documents(1)[:40])
    file = write_task(tmp_path / "task", config)
    sample = {"rows": 14, "seed": 3} if case == "normed, with examples" else {}
    key = metric.partition(",")[0]
    measured, rows = measure(tmp_path / "model", file, test=sample, **{"metric": key, **said})
    everything = [json.loads(line) for line in (file.parent / "test.jsonl").read_text().splitlines()]
    taken = [everything.index(dict(row.doc)) for row in rows]
    assert taken == sorted(taken)
    assert len(taken) == sample.get("rows", len(everything))
    expected, each = harness_scores(tmp_path / "model", file, metric, taken if sample else None, monkeypatch)
    if "perplexity" in key:
        assert measured.also[key] == pytest.approx(expected, rel=1e-5)
        assert measured.score == pytest.approx(1 / expected, rel=1e-5)
        each = [one[0] if isinstance(one, tuple | list) else one for one in each]
        assert measured.statistics[:, 0] == pytest.approx(each, rel=1e-4)
    else:
        assert measured.statistics[:, 0].tolist() == each
        assert measured.score == pytest.approx(expected)
        assert 0 < measured.score < 1
    assert measured.metric.name.removeprefix("1/") == key


def test_rows_are_documents_in_words(tmp_path: Path) -> None:
    save_model(tmp_path, "llama")
    file = write_task(tmp_path / "task", {**CHOICE, "fewshot_split": "train", "description": "count\n"})
    task = LmEval(kind="lm-eval", file=str(file), num_fewshot=1, calibration={"rows": 4}, test={})
    splits = {
        name: KIND.load_split(source, task, (), tmp_path, f"the expert a, {name}")
        for name, source in task.splits().items()
    }
    everything = KIND.load_split(
        task.splits()["calibration"].model_copy(update={"rows": None}), task, (), tmp_path, "a"
    )
    assert not any(row.identity in row.shown for row in everything.rows)
    row = splits["test"].rows[0]
    assert row.prompt.startswith("count\n")
    assert row.prompt.endswith(f"\n\n{row.doc['ask'].strip()} :")
    assert row.answer == f" {row.doc['choices'][row.doc['gold']]}"
    assert row.query == (f"{row.doc['ask'].strip()} :", *row.doc["choices"])
    assert len(row.shown) == 1
    assert KIND.row(json.loads(json.dumps(row.document()))) == row
    KIND.check_splits("the expert a", splits)
    with Checkpoint.open(tmp_path) as checkpoint:
        built = KIND.build(checkpoint.config, tmp_path, {"kind": "lm-eval", "max_length": 12}, 5, "a")
    prepared = built.prepare([row])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    whole = tokenizer(row.prompt + row.answer)["input_ids"]
    assert prepared.columns["input_ids"][0] == whole[-12:]
    assert tokenizer.decode(whole[-12:][prepared.starts[0] :]) == row.answer.strip()


def test_rows_that_are_measured_are_in_no_other_split_and_no_prompt(tmp_path: Path) -> None:
    def splits(config: dict[str, Any], **said: Any) -> Any:
        file = write_task(tmp_path, {**CHOICE, **config})
        task = LmEval(kind="lm-eval", file=str(file), **said)
        return {name: KIND.load_split(source, task, (), tmp_path, name) for name, source in task.splits().items()}

    KIND.check_splits("a", splits({}, calibration={"rows": 9}, validation={"split": "train", "skip": 9}))
    with pytest.raises(DataError, match="a: the splits validation and test share 20 rows"):
        KIND.check_splits("a", splits({}, validation={}, test={"split": "validation"}))
    for examples, said in (
        ("test", {"calibration": {}, "test": {}}),
        ("validation", {"validation": {}, "test": {}}),
        ("test", {"test": {"rows": 15}}),
    ):
        made = splits({"fewshot_split": examples, "num_fewshot": 3}, **said)
        with pytest.raises(DataError, match=rf"show the {examples} row \"w.* with its answer as an example; set few"):
            KIND.check_splits("a", made)
    KIND.check_splits("a", splits({"fewshot_split": "validation", "num_fewshot": 3}, test={}))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "hub": ({"dataset_path": "gsm8k"}, "'dataset_path' is 'gsm8k', which would be fetched or run; only local files"),
    "script": ({"dataset_path": "./load.py"}, "'dataset_path' is './load.py', which would be fetched or run"),
    "address": (
        {"dataset_kwargs": {"data_files": {"test": "https://example.org/a.jsonl"}}},
        "https://example.org/a.jsonl is not a local file",
    ),
    "remote code": (
        {"dataset_kwargs": {**CHOICE["dataset_kwargs"], "trust_remote_code": True}},
        "dataset_kwargs takes data_files alone; remove 'trust_remote_code'",
    ),
    "metric from a hub": (
        {"metric_list": [{"metric": "acc", "hf_evaluate": True}]},
        "'hf_evaluate' would fetch the metric acc as code from a hub; remove the key",
    ),
    "unknown metric": (
        {"metric_list": [{"metric": "owner/metric"}]},
        "a figure for each document .acc, acc_norm, acc_bytes, acc_mutual_info, exact_match of multiple_choice.; add",
    ),
    "median": (
        {"metric_list": [{"metric": "acc", "aggregation": "median"}]},
        "the metric acc is aggregated as 'median', but only 'mean'",
    ),
    "generation as code": (
        {"generation_kwargs": {"custom_generate": "owner/name", "trust_remote_code": True}},
        "'generation_kwargs' takes .*; remove custom_generate",
    ),
    "sampling": ({"generation_kwargs": {"temperature": 0.7}}, "answers would be drawn at random"),
    "prompt library": ({"use_prompt": "promptsource:a"}, "the key 'use_prompt' is not taken"),
    "own code": ({"process_docs": "utils.f"}, "the key 'process_docs' is not taken, since it may run code"),
    "class": ({"class": "utils.Task"}, "the key 'class' is not taken"),
    "unsafe": ({"unsafe_code": True}, "a task with 'unsafe_code' runs what a model writes"),
    "group": ({"group": "many"}, "is a group of tasks; name the file of one task"),
    "filter": (
        {"filter_list": [{"name": "f", "filter": [{"function": "custom", "filter_fn": "os.system"}]}]},
        "'filter_list' has to be a list of named lists of filters, of format_span",
    ),
    "sampler": ({"fewshot_config": {"sampler": "utils.Sampler"}}, "fewshot_config.sampler has to be default or first"),
    "no examples": (
        {"num_fewshot": 1, "training_split": None, "validation_split": None},
        "1 examples are to stand before each prompt, but nothing says what they are taken from; add 'fewshot_split'",
    ),
    "missing data": ({"dataset_kwargs": {"data_files": {"test": "no.jsonl"}}}, "there is no file .*no.jsonl"),
    "missing split": ({"dataset_kwargs": {"data_files": "test.jsonl"}}, "there is no split 'test' in dataset_kwargs"),
    "choices": ({"doc_to_choice": None}, "a task of multiple_choice needs 'doc_to_choice'; add it"),
    "escape": (
        {"doc_to_text": "{{ ''.__class__.__mro__[1].__subclasses__() }}"},
        "row 1 cannot be put into words as .*task.yaml says: access to attribute '__class__' of 'str' object is unsafe",
    ),
    "escape by a filter": (
        {"description": "{{ cycler | attr('__init__') | attr('__globals__') }}"},
        "row 1 cannot be put into words as .*task.yaml says",
    ),
    "no such column": ({"doc_to_text": "{{question}}"}, "says: 'question' is undefined; correct the file or the row"),
    "wrong answer": ({"doc_to_target": "{{'never'}}"}, "task.yaml says: 'never' is not in list"),
}


def read_all(file: Path, **said: Any) -> None:
    task = LmEval(kind="lm-eval", file=str(file), test={}, **said)
    known = TaskFile.read(file)
    known.files("test", task, "the expert a, test")
    known.asked(task)
    KIND.load_split(task.splits()["test"], task, (), file.parent, "the expert a, test")


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_run_or_fetch_something_is_refused(case: str, tmp_path: Path) -> None:
    change, message = REFUSED[case]
    with pytest.raises(DataError, match=message) as caught:
        read_all(write_task(tmp_path, {**CHOICE, **change}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tag", ["!function utils.f", "!!python/name:utils.f", "!!python/object/apply:utils.f []"])
def test_python_in_a_task_file_is_never_imported(tag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "utils.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\ndef f(doc): return 'a'\n")
    monkeypatch.syspath_prepend(tmp_path)
    file = write_task(tmp_path, {key: value for key, value in CHOICE.items() if key != "doc_to_text"})
    (tmp_path / "part.yaml").write_text(f"doc_to_text: {tag}\n")
    file.write_text(file.read_text() + "include: part.yaml\n")
    with pytest.raises(DataError, match=r"part.yaml, line 1: '.*' names Python, and nothing that a task file brings"):
        read_all(file)
    assert not (tmp_path / "ran").exists()
    (tmp_path / "part.yaml").write_text("doc_to_text: ask\ninclude: task.yaml\n")
    with pytest.raises(DataError, match="is included by itself"):
        read_all(file)
    (tmp_path / "part.yaml").write_text("doc_to_text: ask\n")
    read_all(file)
    with pytest.raises(DataError, match=r"the recipe's metric has to be one .*; choose acc or acc_norm"):
        read_all(file, metric="exact_match")
    with pytest.raises(DataError, match="the task has no filter_list"):
        read_all(file, filter="strict")
    with pytest.raises(DataError, match="there is no lm-eval task file"):
        read_all(tmp_path / "none.yaml")


def test_what_the_model_cannot_be_asked_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "gpt2")
    file = write_task(
        tmp_path / "task", {**CHOICE, "doc_to_choice": "{{ [choices[0], ' ', 'w1'] }}", "doc_to_target": "{{0}}"}
    )
    with pytest.raises(DataError, match=r"a: a choice or text has to be of 1 to 24 tokens, which the end of '.* :"):
        measure(tmp_path / "model", file, test={})
    file = write_task(tmp_path / "task", {**SAY, "generation_kwargs": {"max_gen_toks": 24}})
    with pytest.raises(DataError, match="a: answers of 24 tokens leave no room for a prompt in 24 tokens"):
        measure(tmp_path / "model", file, test={})
    steps = [{"function": "take_first_k", "k": 3}]
    file = write_task(tmp_path / "task", {**SAY, "filter_list": [{"name": "many", "filter": steps}]})
    with pytest.raises(DataError, match="a: the filters or metrics of the lm-eval task do not take the answers, from"):
        measure(tmp_path / "model", file, test={"rows": 2})
    backend = Tokenizer(models.WordLevel({"w0": 0}, unk_token="w0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match="has no end-of-text token, which lm-eval needs"):
        measure(tmp_path / "model", file, test={})


def build(folder: Path) -> Path:
    """A base of Llama's shape, an expert that counts on by one and chooses, and one that counts by five and says."""
    save_model(folder / "base", "llama")
    entries = []
    for name, step, config in (("choose", 1, CHOICE), ("say", 5, SAY)):
        file = write_task(folder / "tasks" / name, {**config, "task": name}, step)
        train(folder / "base", folder / "experts" / name, documents(step))
        task = {"kind": "lm-eval", "file": f"tasks/{name}/{file.name}", "max_length": 32}
        task |= {"calibration": {"rows": 16}, "validation": {}, "test": {}}
        entries.append({"name": name, "model": f"./experts/{name}", "task": task})
    entries[0]["task"] |= {"metric": "acc_norm", "num_fewshot": 1}
    entries[1]["task"] |= {"filter": "first"}
    recipe = {
        "base_model": "./base",
        "experts": entries,
        "output": "./merged",
        "search": {"per": "model", "trials": 2},
        "cluster": {"workers": 1},
        "evaluation": {"bootstrap_samples": 100, "compare": ["average"]},
        "coverage": {"minimum": 0.3},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return folder / "recipe.yaml"


def train(base: Path, target: Path, rows: list[dict[str, Any]]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    texts = [tokenizer(f"{row['ask']} : {row['choices'][row['gold']]} [END]")["input_ids"] for row in rows]
    width = max(map(len, texts))
    tokens = torch.tensor([text + [WORDS] * (width - len(text)) for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])
    for _ in range(40):
        model(input_ids=tokens, attention_mask=mask, labels=tokens.masked_fill(mask == 0, -100)).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    model.save_pretrained(target)
    save_tokenizer(target)
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_a_merge_is_measured_by_the_package(
    tmp_path: Path, in_process: None, edit_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build(tmp_path)
    merge = bmm.merge(bmm.Recipe.from_yaml(path), store=tmp_path / "store")
    metrics = merge.document["metrics"]["test"]
    for name, metric, said in (("choose", "acc_norm", {"num_fewshot": 1}), ("say", "exact_match,first", {})):
        file = tmp_path / "tasks" / name / "task.yaml"
        assert metrics[name]["metric"] == metric.partition(",")[0]
        assert metrics[name]["rows"] == 22
        assert metrics[name]["expert"] > metrics[name]["base"]
        low, high = metrics[name]["intervals"]["merged"]
        assert low <= metrics[name]["merged"] <= high
        for model, place in (("merged", merge.output), ("expert", tmp_path / "experts" / name)):
            expected, _ = harness_scores(place, file, metric, None, monkeypatch, **said)
            assert metrics[name][model] == pytest.approx(expected)
    assert np.isfinite(metrics["mean"]["share_of_experts"]["merged"])

    # Where the files lie counts for nothing, and what they say does.
    made = {(one.kind, one.key) for one in Store.open(tmp_path / "store").entries() if one.kind != "run"}
    recipe = yaml.safe_load(path.read_text())
    (tmp_path / "tasks" / "say").rename(tmp_path / "moved")
    recipe["experts"][1]["task"]["file"] = "moved/task.yaml"
    again = bmm.merge(bmm.Recipe.from_yaml(edit_recipe(tmp_path, experts=recipe["experts"])), store=tmp_path / "store")
    assert again.document["metrics"] == merge.document["metrics"]
    # The record of the run tells the recipe as it was written.
    entries = Store.open(tmp_path / "store").entries()
    assert {(one.kind, one.key) for one in entries if one.kind != "run"} == made
    before = fingerprint_inputs(bmm.Recipe.from_yaml(path))
    (tmp_path / "moved" / "task.yaml").write_text(yaml.safe_dump({**SAY, "doc_to_text": "{{ask}}"}))
    after = fingerprint_inputs(bmm.Recipe.from_yaml(path))
    assert before.experts[0] == after.experts[0]
    assert before.experts[1].task != after.experts[1].task
    assert before.experts[1].data != after.experts[1].data


def test_without_the_package_a_sentence_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bmm.kinds.lm_eval_file.find_spec", lambda _: None)
    file = write_task(tmp_path, CHOICE)
    task = LmEval(kind="lm-eval", file=str(file), test={})
    for refused in (
        lambda: KIND.load_split(task.splits()["test"], task, (), tmp_path, "a"),
        lambda: KIND.build({}, tmp_path, {}, 1, "a"),
    ):
        with pytest.raises(RecipeError, match=r"install it with `pip install 'bayesian-model-merging\[lm-eval\]'`"):
            refused()
    expert = {"name": "a", "model": "m", "task": {"kind": "lm-eval", "file": "f", "test": {"path": "json"}}}
    with pytest.raises(UserError, match=r"unknown key 'experts.0.task.test.path'"):
        bmm.Recipe.from_mapping({"base_model": "b", "output": "o", "experts": [expert, {**expert, "name": "c"}]})
