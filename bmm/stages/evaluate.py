"""Stage 6, evaluate: base, experts, anchor, merged model and every method of comparison, on the test rows, once.

Without test rows nothing is compared, and without rows nothing is measured at all. The numbers are made from stored
answers by `bmm.evaluation.metrics`; this stage says whose answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bmm.anchors.settings import AnchorSettings, ScaledSettings, of_method
from bmm.digest import digest_json
from bmm.errors import RecipeError
from bmm.evaluation.metrics import Bootstrap, Measured, share_of_experts
from bmm.evaluation.summary import Method, method_rows, summarise
from bmm.prediction import Panel, StoredWeights
from bmm.recipe import EvaluationSettings, Recipe
from bmm.sources import Inputs, Model
from bmm.stages.anchor import anchor_artefact, checkpoint_reader, chosen_scale
from bmm.stages.heads import digest_of_heads, heads_in, orders_in
from bmm.stages.panel import expert_predictions, panel_of
from bmm.stages.request import Request, Result, Work
from bmm.stages.setup import Setup, setup_of
from bmm.store import Draft, Reference

Answers = dict[str, dict[str, Measured]]


@dataclass(frozen=True)
class Contender:
    """A model that gets a column or a row: its digest, its weights, and what it is called."""

    name: str
    digest: str
    state: Callable[[], dict[str, torch.Tensor]]
    panel: Panel | None = None
    """Its own, where it has other heads than the experts'."""


def evaluate(work: Work, request: Request) -> dict[str, Any]:
    """Measure every model on the test rows, and the four of the main table on the validation rows too, if there are."""
    setup = setup_of(work, request)
    settings = EvaluationSettings.model_validate(request.settings["evaluation"])

    def make(draft: Draft) -> None:
        panel = panel_of(work, request, setup)
        metrics: dict[str, Any] = {}
        rows: list[dict[str, Any]] = []
        main = [
            Contender("base", setup.base.digest, lambda: _base_state(setup)),
            _stored(work, "anchor", Reference.from_json(request.inputs["anchor"])),
            _merged(work, Reference.from_json(request.inputs["search"]), panel),
        ]
        bootstrap: dict[str, Any] = {
            "samples": settings.bootstrap_samples,
            "seed": settings.bootstrap_seed,
            "confidence": settings.confidence,
        }
        if panel.has("validation"):
            metrics["validation"] = summarise(_answers(setup, panel, main, "validation"), **bootstrap)
        if panel.has("test"):
            compared, methods = _compared(work, request, setup, settings)
            answers = _answers(setup, panel, [*main, *compared], "test")
            metrics["test"] = summarise(answers, **bootstrap)
            rows = method_rows(answers, methods, **bootstrap)
        draft.write_json("evaluation.json", {"metrics": metrics, "methods": rows, "bootstrap": bootstrap})

    return {
        "evaluation": work.obtain("evaluation", dict(request.inputs), make, settings=dict(request.settings)).to_json()
    }


def _answers(setup: Setup, panel: Panel, contenders: Sequence[Contender], split: str) -> Answers:
    answers: Answers = {task: {} for task in panel.tasks}
    for task, measured in expert_predictions(setup, panel, split).items():
        answers[task]["expert"] = measured
    for contender in contenders:
        own = contender.panel or panel
        found = own.predictions(contender.digest, contender.state, panel.tasks, split, contender.name)
        for task, measured in found.items():
            answers[task][contender.name] = measured
    return answers


def _compared(
    work: Work, request: Request, setup: Setup, settings: EvaluationSettings
) -> tuple[list[Contender], list[Method]]:
    """Return the methods of comparison, each merged now if the store does not have it."""
    contenders, methods = [], []
    own = dict(request.settings["anchor"])
    if own not in (_compared_settings(name, settings).said() for name in settings.compare):
        reference = Reference.from_json(request.inputs["anchor"])
        methods.append(Method("anchor", f"{own['method']} (the anchor)", _options(work, reference, own)))
    for name in settings.compare:
        method = _compared_settings(name, settings)
        reference = anchor_artefact(work, request, setup, method)
        contenders.append(_stored(work, name, reference))
        said = _options(work, reference, method.said())
        if method.needs == "gram" and request.settings["grams"] != "activations":
            said["grams"] = request.settings["grams"]
        methods.append(Method(name, name, said))
    return contenders, methods


def _compared_settings(method: str, settings: EvaluationSettings) -> AnchorSettings:
    """Return a method's settings as its authors published them, which are the defaults, but for the scale if asked."""
    published = of_method(method)
    if settings.compare_at == "validation" and isinstance(published, ScaledSettings):
        return published.at("validation")
    return published


def _options(work: Work, anchor: Reference, said: dict[str, Any]) -> dict[str, Any]:
    """Return a method's settings as its row shows them, with the scale that was chosen."""
    shown = {name: value for name, value in said.items() if name not in ("method", "scales") and value is not None}
    chosen = chosen_scale(work, anchor)
    return shown if chosen is None else {**shown, "scale": chosen, "chosen_on": "validation"}


def _stored(work: Work, name: str, reference: Reference) -> Contender:
    return Contender(name, reference.digest, lambda: StoredWeights(work.read(reference)).state())


def _merged(work: Work, reference: Reference, panel: Panel) -> Contender:
    """Return the merged encoder, with the heads that were fitted to it."""
    heads = heads_in(work.read(reference).path)
    return replace(_stored(work, "merged", reference), panel=panel.with_heads(heads) if heads else None)


def _base_state(setup: Setup) -> dict[str, torch.Tensor]:
    with setup.weights() as weights:
        return {name: weights.base(name) for name in weights.names()}


def open_panel(work: Work, recipe: Recipe, inputs: Inputs, results: Mapping[str, Result]) -> tuple[Setup, Panel]:
    """Return a merge and the panel of its tasks, given the result of its first stage."""
    given = {"layout": results["experts"].outputs["layout"], "experts": results["experts"].outputs["experts"]}
    where = {"base": inputs.base.to_json(), "experts": [expert.to_json() for expert in inputs.experts]}
    request = Request("evaluate", given, {"batch_size": recipe.evaluation.batch_size}, where)
    setup = setup_of(work, request)
    return setup, panel_of(work, request, setup)


def evaluate_checkpoint(
    work: Work, recipe: Recipe, inputs: Inputs, results: Mapping[str, Result], model: Model, split: str
) -> dict[str, Any]:
    """Measure any checkpoint of the base's architecture, beside the experts themselves.

    A merge's output answers with the heads in it, any other checkpoint with the experts'.

    Raises:
        CheckpointError: the checkpoint lacks a shared tensor, or has one of another shape, or a head of other classes.
        RecipeError: the recipe names no rows of this split.
    """
    settings = recipe.evaluation
    setup, panel = open_panel(work, recipe, inputs, results)
    if not panel.has(split):
        raise RecipeError(
            f"the recipe names no {split} rows to measure {model.source} on; add them to its experts' tasks"
        )

    def state() -> dict[str, torch.Tensor]:
        with ExitStack() as stack:
            read = checkpoint_reader(stack, setup, model, "the checkpoint")
            return {parameter.name: read(parameter.name) for parameter in setup.layout.shared}

    contender = Contender("model", model.digest, state)
    if (heads := digest_of_heads(Path(model.path))) is not None:
        # A merge's output, whose heads may have been fitted to it.
        known = {task: head for task, head in heads_in(Path(model.path)).items() if task in panel.tasks}
        orders = orders_in(Path(model.path), {task: panel.class_names(task) for task in known}, model.source)
        identity = [model.digest, heads, orders] if orders else [model.digest, heads]
        contender = Contender("model", digest_json(identity), state, panel.with_heads(known, orders))
    answers = _answers(setup, panel, [contender], split)
    bootstrap = Bootstrap(
        answers, samples=settings.bootstrap_samples, seed=settings.bootstrap_seed, confidence=settings.confidence
    )
    measured = {name: {task: answers[task][name].score for task in panel.tasks} for name in ("model", "expert")}
    interval = bootstrap.share_of_experts("model")
    return {
        "model": model.to_json(),
        "split": split,
        "tasks": {
            task: {
                "metric": answers[task]["model"].metric.name,
                "rows": panel.rows(task, split),
                "expert": measured["expert"][task],
                "model": measured["model"][task],
                "interval": bootstrap.score(task, "model").document(),
            }
            for task in panel.tasks
        },
        "share_of_experts": {
            "mean": share_of_experts(measured["model"], measured["expert"]),
            "low": interval.low,
            "high": interval.high,
        },
    }
