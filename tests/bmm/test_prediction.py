from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from bmm.checkpoint.layout import Layout
from bmm.errors import ArtefactDamagedError
from bmm.evaluation.metrics import Measured
from bmm.plan import cached_results
from bmm.prediction import Panel, StoredWeights, read_split
from bmm.recipe import Recipe
from bmm.requests import Requests
from bmm.sources import fingerprint_inputs
from bmm.stages.panel import panel_of
from bmm.stages.request import Work
from bmm.stages.setup import Setup, setup_of
from bmm.store import Store

TASKS = ["task0", "task1", "task2"]


def right(measured: Measured) -> list[bool]:
    return [bool(row[0]) for row in measured.statistics]


class Opened:
    """A merged folder's panel and everything around it."""

    def __init__(self, folder: Path) -> None:
        recipe = Recipe.from_yaml(folder / "recipe.yaml")
        inputs = fingerprint_inputs(recipe)
        self.work = Work(Store.open(folder / "store"))
        self.results = cached_results(recipe, inputs, self.work.store)
        self.request = Requests(recipe, inputs).build("search", self.results)
        self.setup: Setup = setup_of(self.work, self.request)
        self.panel: Panel = panel_of(self.work, self.request, self.setup)

    def expert(self, index: int) -> dict[str, torch.Tensor]:
        with self.setup.weights() as weights:
            return {name: weights.expert(index, name).clone() for name in weights.names()}

    def merged(self) -> StoredWeights:
        return StoredWeights(self.work.read(self.results["search"].reference("search")))


@pytest.fixture
def opened(merged: Path) -> Opened:
    return Opened(merged)


def answers(folder: Path, task: str, split: str, encoder: dict[str, torch.Tensor] | None = None) -> Any:
    """Return, row by row and without padding, whether transformers itself finds an encoder with a head right."""
    model = AutoModelForSequenceClassification.from_pretrained(folder / "experts" / task).eval()
    model.bert.load_state_dict(encoder or {}, strict=encoder is not None)
    tokenizer = AutoTokenizer.from_pretrained(folder / "experts" / task)
    right = []
    for line in (folder / "data" / task / f"{split}.jsonl").read_text().splitlines():
        row = json.loads(line)
        with torch.inference_mode():
            encoded = tokenizer(row["text"], return_tensors="pt", truncation=True, max_length=16)
            logits = model(input_ids=encoded["input_ids"]).logits
        right.append(model.config.id2label[int(logits.argmax())] == row["label"])
    return np.array(right)


def evaluated(panel: Panel, state: Mapping[str, torch.Tensor], split: str) -> dict[str, Measured]:
    """Run a model part by part, and measure its answers in the rows' order."""
    found: dict[str, list[tuple[int, torch.Tensor]]] = {task: [] for task in panel.tasks}
    for part in panel.answers_in_parts(state, split):
        for task, (indices, answers) in part.items():
            found[task] += zip(indices, answers, strict=True)
    return {
        task: panel.measured(task, split, torch.stack([answer for _, answer in sorted(rows, key=lambda row: row[0])]))
        for task, rows in found.items()
    }


@pytest.mark.parametrize("task", TASKS)
def test_an_expert_answers_as_transformers_says(opened: Opened, merged: Path, task: str) -> None:
    found = evaluated(opened.panel, opened.expert(TASKS.index(task)), "test")[task]
    assert right(found) == answers(merged, task, "test").tolist()
    assert opened.panel.rows(task, "test") == 60


def test_one_encoder_serves_every_task_with_its_own_head(opened: Opened, merged: Path) -> None:
    for index in (2, 0):
        state = opened.expert(index)
        for task, found in evaluated(opened.panel, state, "validation").items():
            assert right(found) == answers(merged, task, "validation", state).tolist(), (index, task)


def test_answers_are_kept_and_nothing_runs_twice(opened: Opened) -> None:
    asked: list[int] = []

    def state() -> dict[str, torch.Tensor]:
        asked.append(1)
        return opened.expert(0)

    first = opened.panel.predictions("some digest", state, TASKS, "test", "it")
    made = opened.work.made
    assert (len(asked), made) == (1, 3)
    again = opened.panel.predictions("some digest", state, ["task1"], "test", "it")
    assert (len(asked), opened.work.made) == (1, made)
    assert right(again["task1"]) == right(first["task1"])
    opened.panel.predictions("some digest", state, ["task1"], "validation", "it")
    assert (len(asked), opened.work.made) == (2, made + 1)
    assert right(first["task0"]) == right(evaluated(opened.panel, opened.expert(0), "test")["task0"])


def test_answers_are_not_those_of_an_encoder_of_which_a_head_replaces_a_part(opened: Opened, merged: Path) -> None:
    def base(layout: Layout) -> dict[str, torch.Tensor]:
        with opened.setup.weights() as weights:
            return {parameter.name: weights.base(parameter.name).clone() for parameter in layout.shared}

    # As beside an expert without a pooler: then the pooler travels with the heads of those that have one.
    whole = opened.setup.layout
    pooler = {one.name: one.expert_keys for one in whole.shared if one.name.startswith("pooler.")}
    apart = replace(
        whole,
        shared=tuple(one for one in whole.shared if one.name not in pooler),
        heads={
            task: {**keys, **{f"bert.{name}": stored[task] for name, stored in pooler.items()}}
            for task, keys in whole.heads.items()
        },
        unmatched=tuple(pooler),
    )
    digest = opened.setup.base.digest
    first = opened.panel.logits(digest, lambda: base(whole), ["task0"], "test", "base")["task0"]
    opened.setup = replace(opened.setup, layout=apart)
    panel = panel_of(opened.work, opened.request, opened.setup)
    second = panel.logits(digest, lambda: base(apart), ["task0"], "test", "base")["task0"]
    assert not torch.equal(first, second)
    model = AutoModelForSequenceClassification.from_pretrained(merged / "experts" / "task0").eval()
    model.bert.load_state_dict(base(apart), strict=False)
    row = read_split(opened.work.read(opened.results["experts"].reference("experts", "task0")), "test").rows[0]
    encoded = AutoTokenizer.from_pretrained(merged / "experts" / "task0")(row.text, return_tensors="pt")
    with torch.inference_mode():
        torch.testing.assert_close(second[0], model(input_ids=encoded["input_ids"]).logits[0], atol=1e-5, rtol=1e-4)


def test_an_evaluation_for_the_search_keeps_nothing(opened: Opened) -> None:
    before = len(opened.work.store.entries())
    evaluated(opened.panel, opened.expert(0), "validation")
    assert len(opened.work.store.entries()) == before


def test_weights_that_are_not_finite_are_said_to_be(opened: Opened) -> None:
    state = opened.expert(0)
    state["encoder.layer.1.output.dense.weight"].fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="logits of task0 are not finite"):
        evaluated(opened.panel, state, "validation")


def test_stored_weights_are_read_by_name(opened: Opened, merged: Path) -> None:
    stored = opened.merged()
    state = stored.state()
    assert set(state) == {parameter.name for parameter in opened.setup.layout.shared}
    name = "encoder.layer.0.intermediate.dense.weight"
    assert torch.equal(stored(name), state[name])
    with pytest.raises(KeyError):
        stored("no.such.weight")


def test_rows_are_those_of_the_file(opened: Opened, merged: Path) -> None:
    reference = opened.results["experts"].reference("experts", "task1")
    split = read_split(opened.work.read(reference), "test")
    lines = [json.loads(line) for line in (merged / "data" / "task1" / "test.jsonl").read_text().splitlines()]
    assert [row.text for row in split.rows] == [line["text"] for line in lines]
    assert [row.label for row in split.rows] == [["yes", "no"].index(line["label"]) for line in lines]
    (merged / "store" / "artefacts" / reference.kind / reference.key / "test.jsonl").write_text("")
    with pytest.raises(ArtefactDamagedError):
        Work(Store.open(merged / "store")).read(reference)
