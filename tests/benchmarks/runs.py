"""Running a row on one draw of calibration rows: the product's own stages and store, nothing computed twice.

A zoo is any recipe whose experts have rows for all three splits; its calibration rows are the pool that each draw is
taken from. Which methods there are is `benchmarks.rows`; what comes of the answers is `benchmarks.summary`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from benchmarks import leads, peers
from benchmarks.leads import Lead
from benchmarks.peers import Peer
from benchmarks.rows import LAMBDA, PROPAGATED, Changes, How, Row

from bmm.evaluation.metrics import Measured, mean_ratio_to_expert
from bmm.pipeline import perform_here, run_stages
from bmm.prediction import Panel, StoredWeights
from bmm.recipe import Recipe
from bmm.requests import Requests
from bmm.sources import Inputs, fingerprint_inputs
from bmm.stages.evaluate import open_panel
from bmm.stages.heads import heads_in
from bmm.stages.panel import expert_predictions
from bmm.stages.request import Request, Result, Work
from bmm.stages.setup import Setup
from bmm.store import Reference, Store

# What a row decides, and what a benchmark does not do.
_NOT_THE_ZOOS = ("grams", "regression", "search", "tracking", "output")
_STAGES = {
    "experts": ("experts",),
    "grams": ("experts", "grams"),
    "anchor": ("experts", "anchor"),
    "both": ("experts", "grams", "anchor"),
    "search": ("experts", "grams", "anchor", "search"),
}


@dataclass(frozen=True)
class Zoo:
    """Experts to be merged.

    Attributes:
        name: what the results call it.
        recipe: a recipe's file.
        folder: where the benchmark keeps its store and its times.
    """

    name: str
    recipe: Path
    folder: Path


@dataclass(frozen=True)
class Model:
    """A merged encoder: its digest, by which its answers are known, and the seconds that making it took."""

    digest: str
    seconds: float


class Bench:
    """One zoo with everything that its runs share."""

    def __init__(self, zoo: Zoo) -> None:
        self.zoo = zoo
        self.store = Store.open(zoo.folder / "store")
        self.given = Recipe.from_yaml(zoo.recipe)
        self._values = yaml.safe_load(zoo.recipe.read_text(encoding="utf-8"))
        self._inputs: dict[tuple[int, int, bool], Inputs] = {}

    def run(self, row: Row, seed: int, rows: int) -> Model:
        """Merge by the row's method, and let the model answer the test rows; what is done already is not done again.

        Args:
            row: the method.
            seed: of the draw of calibration rows, and of the search.
            rows: how many a task; a task with fewer gives all that it has.
        """
        match row.how:
            case Peer():
                reference, seconds = self._peer(row.how, seed, rows)
            case Lead():
                reference, seconds = self._lead(row.how, seed, rows)
            case How():
                reference, seconds = self._own(row.how, seed, rows)
        panel = self._panel_with(reference)
        panel.predictions(reference.digest, self._state_of(reference), panel.tasks, "test", row.method)
        return Model(reference.digest, seconds)

    def merged(self, how: How, seed: int, rows: int) -> str:
        """Merge by a recipe, let the model answer validation and test rows, and return its digest."""
        reference, _ = self._own(how, seed, rows)
        panel = self._panel_with(reference)
        for split in ("validation", "test"):
            panel.predictions(reference.digest, self._state_of(reference), panel.tasks, split, "model")
        return reference.digest

    def _panel_with(self, reference: Reference) -> Panel:
        """Return the panel with the heads that were fitted to a model."""
        return self._test[1].with_heads(heads_in(self.store.read(reference).path))

    def _state_of(self, reference: Reference) -> Callable[[], dict[str, torch.Tensor]]:
        return lambda: StoredWeights(self.store.read(reference)).state()

    def before_search(self, how: How, seed: int, rows: int) -> tuple[Recipe, Inputs, Mapping[str, Result]]:
        """Return a recipe, its inputs, and the results of the stages that a search stands on."""
        return self._results(how, seed, rows)

    def search_of(self, how: How, seed: int, rows: int) -> dict[str, Any]:
        """Return what the search stage of a recipe that has been run says."""
        _, _, results = self._results(how, seed, rows)
        found: dict[str, Any] = self.store.read(results["search"].reference("search")).read_json("search.json")
        return found

    def share(self, digest: str, split: str) -> float:
        """Return a known model's mean over tasks of its score over the expert's."""
        setup, panel = self._test

        def unknown() -> NoReturn:
            raise KeyError(f"the model {digest} has not been run")

        experts = expert_predictions(setup, panel, split)
        found = panel.predictions(digest, unknown, panel.tasks, split, "model")
        scores = {task: one.score for task, one in found.items()}
        return mean_ratio_to_expert(scores, {task: one.score for task, one in experts.items()})

    def _own(self, how: How, seed: int, rows: int) -> tuple[Reference, float]:
        """Return the model of a recipe, and the seconds of the stages behind it, those that only read rows apart."""
        seconds: dict[str, float] = {}
        for part in (*how.after, how):
            _, _, results = self._results(part, seed, rows)
            seconds |= {result.key: self._seconds(result) for name, result in results.items() if name != "experts"}
        return results[how.stage].reference(how.stage), sum(seconds.values())

    def _peer(self, peer: Peer, seed: int, rows: int) -> tuple[Reference, float]:
        work = Work(self.store)
        recipe, inputs, results = self._results(How({}, "experts"), seed, rows)
        setup, _ = open_panel(work, recipe, inputs, results)
        data = {
            expert.name: work.read(results["experts"].reference("experts", expert.name)) for expert in setup.experts
        }
        return peers.merge(peer, work, setup, data)

    def _lead(self, lead: Lead, seed: int, rows: int) -> tuple[Reference, float]:
        recipe, inputs, results = self._results(How(PROPAGATED, "both"), seed, rows)
        anchored = sum(self._seconds(result) for name, result in results.items() if name != "experts")
        request = Requests(recipe, inputs).build("search", results)
        reference, seconds = leads.merge(lead, LAMBDA, Work(self.store), request)
        return reference, anchored + seconds

    def answers(
        self, digest: str, state: Callable[[], dict[str, torch.Tensor]] | None = None, what: str = "model"
    ) -> Mapping[str, Measured]:
        """Return, by task, what a model's answers on the test rows are worth; without `state` only known ones."""

        def unknown() -> NoReturn:
            raise KeyError(f"{what} has not been run")

        _, panel = self._test
        return panel.predictions(digest, state or unknown, panel.tasks, "test", what)

    def references(self) -> dict[str, Mapping[str, Measured]]:
        """Return the test answers of the experts, each on its own task, and of the base."""
        setup, panel = self._test

        def base() -> dict[str, torch.Tensor]:
            with setup.weights() as weights:
                return {name: weights.base(name) for name in weights.names()}

        return {"expert": expert_predictions(setup, panel, "test"), "base": self.answers(setup.base.digest, base)}

    @property
    def kind(self) -> str:
        """The kind of the first task."""
        return self.given.experts[0].task.kind

    @property
    def anchor(self) -> dict[str, Any]:
        """The anchor of the regressed rows, where a row does not say another: the recipe's."""
        return self.given.anchor.model_dump(mode="json")

    def rows(self, split: str) -> dict[str, int]:
        """Return how many rows each task has in a split as the zoo gives it."""
        _, panel = self._test
        return {task: panel.rows(task, split) for task in panel.tasks}

    @cached_property
    def _whole(self) -> tuple[Recipe, Inputs, Mapping[str, Result]]:
        """The zoo as it is given, with the whole pool of calibration rows."""
        recipe = Recipe.from_mapping(self._with({}), folder=self.given.folder)
        inputs = fingerprint_inputs(recipe, check_output_folder=False)
        return recipe, inputs, run_stages(recipe, inputs, self.store, perform_here, ("experts",))

    @cached_property
    def _test(self) -> tuple[Setup, Panel]:
        return open_panel(Work(self.store), *self._whole)

    def recipe(self, how: How, seed: int, rows: int) -> Recipe:
        """Return the zoo's recipe with a row's changes, on one draw of its calibration rows."""
        values = self._with(how.changes)
        pool = self.rows("calibration")
        for expert in values["experts"]:
            source = expert["task"]["calibration"]
            source |= {"rows": min(rows, pool[expert["name"]]), "seed": seed}
        if isinstance(values.get("search"), dict):
            values["search"] = {"seed": seed, **values["search"]}
        return Recipe.from_mapping(values, folder=self.given.folder)

    def _results(self, how: How, seed: int, rows: int) -> tuple[Recipe, Inputs, Mapping[str, Result]]:
        recipe = self.recipe(how, seed, rows)
        which = (seed, rows, recipe.anchor.method == "checkpoint")
        if which not in self._inputs:
            self._inputs[which] = fingerprint_inputs(recipe, check_output_folder=False)
        stages = _STAGES[how.stage]
        if how.stage == "anchor" and recipe.anchor.needs == "gram":
            stages = ("experts", "grams", "anchor")
        inputs = self._inputs[which]
        return recipe, inputs, run_stages(recipe, inputs, self.store, self._timed, stages)

    def _with(self, changes: Changes) -> dict[str, Any]:
        """Return the zoo's recipe with a row's changes."""
        kept = {key: value for key, value in self._values.items() if key not in _NOT_THE_ZOOS}
        copied: dict[str, Any] = json.loads(json.dumps({**kept, **changes, "output": "./never-written"}))
        return copied

    def _timed(self, store: Store, request: Request) -> Result:
        """Run one stage and, unless it was done before, write down how long it took."""
        result = perform_here(store, request)
        place = self._time_of(result)
        if result.state == "ran" or not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            written = place.with_name(f".{place.name}.{os.getpid()}")
            written.write_text(json.dumps(result.seconds), encoding="utf-8")
            written.replace(place)
        return result

    def _seconds(self, result: Result) -> float:
        """Return how long a stage took when it ran: here, or in an earlier run of the benchmark."""
        return float(json.loads(self._time_of(result).read_text(encoding="utf-8")))

    def _time_of(self, result: Result) -> Path:
        return self.zoo.folder / "seconds" / result.key
