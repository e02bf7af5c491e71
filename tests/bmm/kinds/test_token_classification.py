"""Classes of words: spans against their definition, alignment against transformers, and a merge of two kinds."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from family_checkpoints import CLASSES, config_of, move, save_tokenizer, texts
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import bmm
from bmm.errors import DataError
from bmm.kinds.settings import SplitSource, TokenClassification
from bmm.kinds.token_classification import TokenClassificationKind, WordsRow, spans

KIND = TokenClassificationKind()
TAGS = ["O", "B-A", "I-A"]
TYPES = st.lists(st.tuples(st.sampled_from("ABC"), st.integers(1, 3), st.integers(0, 2)), max_size=6)


def tags_of(words: list[str]) -> list[str]:
    """Tag each run of words from w10 to w29 as a span."""
    inside = [10 <= int(word[1:]) < 30 for word in words]
    return ["O" if not here else ("I-A" if place and inside[place - 1] else "B-A") for place, here in enumerate(inside)]


@settings(deadline=None, max_examples=25)
@given(TYPES, st.sampled_from(["IOB2", "BIOES", "BILOU"]))
def test_spans_are_read_back_from_every_scheme(layout: list[tuple[str, int, int]], scheme: str) -> None:
    tags: list[str] = []
    expected = set()
    for kind, length, gap in layout:
        expected.add((kind, len(tags), len(tags) + length))
        inside = ["B", *["I"] * (length - 1)]
        if scheme != "IOB2":
            inside[-1] = {"BIOES": "ES", "BILOU": "LU"}[scheme][length == 1]
        tags += [f"{prefix}-{kind}" for prefix in inside] + ["O"] * gap
    assert spans(tags) == expected


def test_spans_of_tags_that_break_the_scheme_are_conlls() -> None:
    assert spans(["I-A", "I-A", "O", "I-B", "I-A"]) == {("A", 0, 2), ("B", 3, 4), ("A", 4, 5)}
    assert spans(["NOUN", "NOUN", "VERB"]) == {("NOUN", 0, 2), ("VERB", 2, 3)}
    assert spans([]) == set()


def test_statistics_count_spans_and_leave_out_words_that_were_not_read() -> None:
    metric = KIND.metric("span-f1", TAGS)
    labels = [(1, 2, 0), (1, 0)]
    answers = np.zeros((5, 4))
    for place, index in enumerate([1, 2, 1, 1, 0]):
        answers[place, [index, 3]] = 1
    assert metric.statistics(answers, labels).tolist() == [[1, 2, 1], [1, 1, 1]]
    assert float(metric.score(metric.statistics(answers, labels).sum(0))) == pytest.approx(4 / 5)
    answers[2, 3] = 0
    assert metric.statistics(answers, labels).tolist() == [[1, 1, 1], [1, 1, 1]]
    words = KIND.metric("accuracy", TAGS)
    assert words.statistics(answers, labels).tolist() == [[2, 2], [2, 2]]


def test_rows_are_checked_and_come_back(tmp_path: Path) -> None:
    source = SplitSource(path="json", data_files="rows.jsonl")
    task = TokenClassification(kind="token-classification")

    def load(row: dict[str, Any]) -> Any:
        (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
        return KIND.load_split(source, task, TAGS, tmp_path, "expert names, test")

    split = load({"tokens": ["w1", "w2"], "tags": ["O", "B-A"]})
    assert split.rows == (WordsRow(("w1", "w2"), (0, 1)),)
    assert KIND.row(split.rows[0].document()) == split.rows[0]
    with pytest.raises(DataError, match="row 1 does not have one label for each of its 2 words"):
        load({"tokens": ["w1", "w2"], "tags": ["O"]})
    with pytest.raises(DataError, match="row 1 has no list of words in column 'tokens'"):
        load({"tokens": "w1 w2", "tags": ["O"]})


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_answers_do_not_depend_on_the_batch(tmp_path: Path, family: str, side: str) -> None:
    config = config_of(family, **CLASSES)
    torch.manual_seed(0)
    tagger = transformers.AutoModelForTokenClassification.from_config(config)
    move(tagger, 1, by=0.25)
    tokenizer = save_tokenizer(tmp_path, side=side)
    rows = [WordsRow(tuple(text.split()), (0,) * len(text.split())) for text in texts(0, 12)]
    model = KIND.build(config.to_dict(), tmp_path, {"max_length": 16}, 12, "task")
    state = tagger.state_dict()
    inner = f"{tagger.base_model_prefix}."
    model.load_head({name: tensor for name, tensor in state.items() if not name.startswith(inner)})
    model.load_encoder({name.removeprefix(inner): state[name] for name in state if name.startswith(inner)})
    alone = []
    for row in rows:
        encoded = tokenizer(list(row.words), is_split_into_words=True, return_tensors="pt")
        with torch.inference_mode():
            # Each word is one token, between a beginning and an end.
            alone.append(tagger.eval()(input_ids=encoded["input_ids"]).logits[0, 1:-1])
    found = model.logits(model.prepare(rows))
    assert bool((found[:, -1] == 1).all())
    torch.testing.assert_close(found[:, :-1], torch.cat(alone), atol=1e-5, rtol=1e-4)


def with_words(folder: Path) -> Path:
    """Make the second pico expert one that tags words."""
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    recipe["experts"] = recipe["experts"][:2]
    generator = random.Random(0)
    texts = list(dict.fromkeys(tuple(f"w{generator.randrange(60)}" for _ in range(6)) for _ in range(200)))
    rows = [{"tokens": list(words), "tags": tags_of(list(words))} for words in texts]
    torch.manual_seed(0)
    names = dict(enumerate(TAGS))
    model = transformers.AutoModelForTokenClassification.from_pretrained(
        folder / "base", num_labels=3, id2label=names, label2id={name: index for index, name in names.items()}
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "base")
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for start in [*range(0, len(rows), 25)] * 15:
        some = rows[start : start + 25]
        ids = tokenizer([row["tokens"] for row in some], is_split_into_words=True, return_tensors="pt")["input_ids"]
        labels = torch.tensor([[-100, *(TAGS.index(tag) for tag in row["tags"]), -100] for row in some])
        model(input_ids=ids, labels=labels).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    target = folder / "experts" / "words"
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    task: dict[str, Any] = {"kind": "token-classification", "max_length": 16}
    for split, some in (("calibration", rows[:40]), ("validation", rows[40:80]), ("test", rows[80:120])):
        file = folder / "data" / f"words-{split}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in some))
        task[split] = {"path": "json", "data_files": f"data/words-{split}.jsonl"}
    recipe["experts"][1] = {"name": "words", "model": "./experts/words", "task": task}
    recipe |= {"search": {"per": "model", "trials": 2}, "cluster": {"workers": 1}}
    recipe["evaluation"] = {"bootstrap_samples": 100, "compare": ["average"]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return folder / "recipe.yaml"


@pytest.mark.slow
def test_experts_of_two_kinds_share_one_encoder(pico: Path, in_process: None) -> None:
    merge = bmm.merge(bmm.Recipe.from_yaml(with_words(pico)), store=pico / "store")
    metrics = merge.document["metrics"]["test"]
    assert (metrics["task0"]["metric"], metrics["words"]["metric"]) == ("accuracy", "span-f1")
    assert metrics["words"]["expert"] > 0.8
    text, words = (load_file(merge.output / "heads" / f"{name}.safetensors") for name in ("task0", "words"))
    assert "bert.pooler.dense.weight" in text
    assert set(words) == {"classifier.weight", "classifier.bias"}
    model = transformers.AutoModelForTokenClassification.from_pretrained(merge.output, num_labels=3).eval()
    model.load_state_dict(words, strict=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(merge.output)
    right = found = true = 0
    for line in (pico / "data" / "words-test.jsonl").read_text().splitlines():
        row = json.loads(line)
        ids = tokenizer(row["tokens"], is_split_into_words=True, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            said = [TAGS[index] for index in model(input_ids=ids).logits[0, 1:-1].argmax(-1).tolist()]
        ours, theirs = spans(said), spans(row["tags"])
        right, found, true = right + len(ours & theirs), found + len(ours), true + len(theirs)
    assert metrics["words"]["merged"] == pytest.approx(2 * right / (found + true))
