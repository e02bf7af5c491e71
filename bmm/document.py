"""`merge.json`: what a merge was made of, what came out, and how; built from artefacts, schema 1.

Numbers come from the stages and are only put in place here. The same document feeds the report, the card, the
terminal and the tracker.
"""

from __future__ import annotations

import os
import platform
import resource
import sys
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from bmm.checkpoint.layout import Layout
from bmm.digest import digest_json
from bmm.grams.settings import sample_in
from bmm.notes import (
    other_bases,
    shards_again,
    singular_grams,
    starved_experts,
    unmatched,
    unmeasured,
    unused,
    zero_task_vectors,
)
from bmm.recipe import Recipe
from bmm.sources import Inputs
from bmm.stages.request import COVERAGE, Result, Work

SCHEMA = 1
_LIBRARIES = ("torch", "transformers", "safetensors", "numpy", "dask", "zarr", "botorch", "gpytorch", "datasets")
# Linux counts ru_maxrss in KiB, macOS in bytes.
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024


def build_document(recipe: Recipe, inputs: Inputs, results: Mapping[str, Result], work: Work) -> dict[str, Any]:
    """Return the whole of `merge.json` for a finished merge."""
    evaluation, coverage, searched = _outcome(recipe, results, work)
    experts = {
        expert.name: work.read(results["experts"].reference("experts", expert.name)).read_json("expert.json")
        for expert in inputs.experts
    }
    layout_artefact = work.read(results["experts"].reference("layout"))
    layout = Layout.from_json(layout_artefact.read_json("layout.json"))
    anchor = recipe.anchor.model_dump(mode="json")
    if inputs.anchor is not None:
        anchor["digest"] = inputs.anchor.digest
    if recipe.anchor.chooses_scale:
        anchor["chosen"] = work.read(results["anchor"].reference("anchor")).read_json("scale.json")
    said = recipe.document()
    grams = results["grams"].outputs["experts"] if "grams" in results else {}
    shards = {
        name: made["shards"] for name, value in grams.items() if "shards" in (made := work.read(value).provenance)
    }
    return {
        "schema": SCHEMA,
        "recipe_digest": digest_json(said),
        "recipe": said,
        "base": {
            "source": inputs.base.source,
            "digest": inputs.base.digest,
            "revision": inputs.base.revision,
            "license": layout_artefact.read_json("base.json")["license"],
        },
        "experts": [
            {
                "name": expert.name,
                "source": expert.model.source,
                "digest": expert.model.digest,
                "revision": expert.model.revision,
                "task": expert.task["kind"],
                "labels": experts[expert.name]["labels"],
                "license": experts[expert.name]["license"],
                "own_tokens": max(layout.extra_rows(expert.name).values(), default=0),
                "own_tokenizer": expert.name in layout.tokenizers,
            }
            for expert in inputs.experts
        ],
        "anchor": anchor,
        "grams": {
            "source": recipe.grams.source if "grams" in results else None,
            **sample_in(vars(recipe.grams)),
            "experts": {name: value["digest"] for name, value in grams.items()},
            "shards": shards,
        },
        "metrics": {
            split: {task: measured[task] for task in (*experts, "mean")}
            for split, measured in evaluation["metrics"].items()
        },
        "methods": [{**row, "tasks": {task: row["tasks"][task] for task in experts}} for row in evaluation["methods"]],
        "coverage": coverage,
        "search": searched,
        "stages": {
            name: {"state": result.state, "seconds": round(result.seconds, 3), "key": result.key}
            for name, result in results.items()
        },
        "data": {name: expert["splits"] for name, expert in experts.items()},
        "bootstrap": evaluation["bootstrap"],
        "notes": [
            *other_bases({name: expert.get("trained_on") for name, expert in experts.items()}, inputs.base.source),
            *unmatched(layout.unmatched),
            *unused(layout.unused),
            *shards_again(shards),
            *(() if recipe.anchor_alone else unmeasured(evaluation["metrics"])),
            *(zero_task_vectors(_norms(results, inputs, work)) if "task-vectors" in results else ()),
            *starved_experts(coverage),
            *singular_grams(coverage),
        ],
        "environment": environment(),
        "peak_rss_bytes": peak_rss_bytes(),
    }


def environment() -> dict[str, Any]:
    """Return the versions and the machine's size that the numbers were made with."""
    return {
        "bmm": version("bayesian-model-merging"),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "threads": _threads(),
        **{name: version(name) for name in _LIBRARIES},
    }


def _threads() -> int | None:
    # Asking torch would import it, which a run with everything cached does without.
    torch = sys.modules.get("torch")
    return torch.get_num_threads() if torch is not None else None


def peak_rss_bytes() -> int:
    """Return the largest resident memory of this process or any finished child, in bytes."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return max(own, children) * _RSS_UNIT


def _outcome(
    recipe: Recipe, results: Mapping[str, Result], work: Work
) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """Return what was measured, how each parameter came about, and what was searched."""
    if not recipe.anchor_alone:
        found = work.read(results["search"].reference("search"))
        evaluation = work.read(results["evaluate"].reference("evaluation")).read_json("evaluation.json")
        return evaluation, found.read_json("coverage.json"), found.read_json("search.json")
    settings = recipe.evaluation
    bootstrap = {"samples": settings.bootstrap_samples, "seed": settings.bootstrap_seed}
    evaluation = {"metrics": {}, "methods": [], "bootstrap": {**bootstrap, "confidence": settings.confidence}}
    searched: dict[str, Any] = {
        "per": recipe.search.per,
        "lambda": "none",
        "objective": None,
        "seed": None,
        "expert": {},
        "trials": [],
    }
    searched["best"] = {"index": None, "objective": None, "settings": {}}
    return evaluation, work.read(results["publish"].reference("model")).provenance[COVERAGE], searched


def _norms(results: Mapping[str, Result], inputs: Inputs, work: Work) -> dict[str, Any]:
    return {
        expert.name: work.read(results["task-vectors"].reference("experts", expert.name)).read_json("norms.json")
        for expert in inputs.experts
    }
