from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from bmm.digest import digest_json
from bmm.document import build_document, environment, peak_rss_bytes
from bmm.pipeline import STAGES
from bmm.plan import cached_results
from bmm.recipe import Recipe
from bmm.sources import fingerprint_inputs
from bmm.stages.request import Work
from bmm.store import Store


def record(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(properties), "properties": properties}


def table(values: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": values, "minProperties": 1}


def listed(values: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": values, "minItems": 1}


SHARE = {"type": "number", "minimum": 0, "maximum": 1}
NUMBER, TEXT, COUNT = {"type": "number"}, {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 0}
DIGEST = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
OPTIONAL_TEXT, OPTIONAL_NUMBER = {"type": ["string", "null"]}, {"type": ["number", "null"]}
ROLES = ("base", "expert", "anchor", "merged")
BOUNDS = {"type": "array", "items": NUMBER, "minItems": 2, "maxItems": 2}
TASK = record(metric=TEXT, rows=COUNT, **dict.fromkeys(ROLES, SHARE), intervals=record(**dict.fromkeys(ROLES, BOUNDS)))
SHARES = record(base=NUMBER, anchor=NUMBER, merged=NUMBER)
MEAN = record(
    **dict.fromkeys(ROLES, SHARE),
    share_of_experts=SHARES,
    intervals=record(share_of_experts=record(base=BOUNDS, anchor=BOUNDS, merged=BOUNDS)),
)
SPLIT = {**record(task0=TASK, task1=TASK, task2=TASK, mean=MEAN), "additionalProperties": False}
SETTING = record(**{"lambda": OPTIONAL_NUMBER, "gamma": NUMBER})
DOCUMENT = record(
    schema={"const": 1},
    recipe_digest=DIGEST,
    recipe=Recipe.model_json_schema(),
    base=record(source=TEXT, digest=DIGEST, revision=OPTIONAL_TEXT),
    experts=listed(
        record(
            name=TEXT,
            source=TEXT,
            digest=DIGEST,
            revision=OPTIONAL_TEXT,
            task={"const": "text-classification"},
            labels=listed(TEXT),
            license=OPTIONAL_TEXT,
        )
    ),
    anchor=record(method=TEXT),
    metrics=record(validation=SPLIT, test=SPLIT),
    methods=listed(
        record(
            method=TEXT,
            settings={"type": "object"},
            tasks=table(SHARE),
            mean=SHARE,
            share_of_experts=record(mean=NUMBER, low=NUMBER, high=NUMBER),
        )
    ),
    coverage=listed(
        record(
            parameter=TEXT,
            shape=listed(COUNT),
            treatment={"enum": ["regressed", "anchored", "averaged", "copied"]},
            module=OPTIONAL_TEXT,
            **{"lambda": OPTIONAL_NUMBER, "gamma": OPTIONAL_NUMBER, "condition": OPTIONAL_NUMBER},
        )
    ),
    search=record(
        per=TEXT,
        trials=listed(
            record(
                index=COUNT,
                origin={"enum": ["anchor", "global", "sobol", "bayesian"]},
                state={"enum": ["complete", "stopped", "failed"]},
                settings=table(SETTING),
                objective=OPTIONAL_NUMBER,
                tasks={"type": "object", "additionalProperties": SHARE},
                variance=OPTIONAL_NUMBER,
                seen=SHARE,
            )
        ),
        ended={"enum": ["trials", "evaluations", "minutes"]},
        best=record(index=COUNT, objective=NUMBER, settings=table(SETTING)),
    ),
    stages={
        **record(**{name: record(state={"enum": ["ran", "cached"]}, seconds=NUMBER, key=DIGEST) for name in STAGES}),
        "additionalProperties": False,
    },
    data=table(record(**dict.fromkeys(("calibration", "validation", "test"), record(rows=COUNT, digest=DIGEST)))),
    environment=record(torch=TEXT, transformers=TEXT, python=TEXT, bmm=TEXT),
    peak_rss_bytes=COUNT,
)


@pytest.fixture
def document(merged_source: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((merged_source / "merged" / "merge.json").read_text(encoding="utf-8"))
    return value


def test_the_document_is_laid_down_as_promised(document: dict[str, Any]) -> None:
    # References inside the recipe's schema are relative to that schema.
    schema = {**DOCUMENT, "properties": {**DOCUMENT["properties"], "recipe": {"type": "object"}}}
    jsonschema.Draft202012Validator(schema).validate(document)
    jsonschema.Draft202012Validator(Recipe.model_json_schema()).validate(document["recipe"])


def test_the_numbers_fit_together(document: dict[str, Any]) -> None:
    for split in ("validation", "test"):
        metrics = document["metrics"][split]
        tasks = [metrics[name] for name in ("task0", "task1", "task2")]
        for role in ROLES:
            assert metrics["mean"][role] == pytest.approx(sum(task[role] for task in tasks) / 3)
        assert all(task["rows"] == 60 for task in tasks)
        assert all(
            task["intervals"][role][0] <= task[role] <= task["intervals"][role][1] for task in tasks for role in ROLES
        )
    validation = document["metrics"]["validation"]["mean"]["share_of_experts"]
    assert validation["merged"] >= validation["anchor"]
    methods = {row["method"]: row for row in document["methods"]}
    assert next(iter(methods)) == "base"
    assert list(methods)[-1] == "merged"
    assert {"average", "ta", "ties", "tsv", "wudi", "regmean", "experts"} <= set(methods)
    test = document["metrics"]["test"]
    assert methods["merged"]["tasks"] == {name: test[name]["merged"] for name in ("task0", "task1", "task2")}
    assert methods["wudi"]["tasks"] == {name: test[name]["anchor"] for name in ("task0", "task1", "task2")}


def test_the_search_is_told_whole(document: dict[str, Any]) -> None:
    trials, best = document["search"]["trials"], document["search"]["best"]
    assert [trial["index"] for trial in trials] == list(range(5))
    assert trials[0]["origin"] == "anchor"
    assert all(setting == {"lambda": None, "gamma": 1.0} for setting in trials[0]["settings"].values())
    assert best["objective"] >= trials[0]["objective"]
    assert best["objective"] == trials[best["index"]]["objective"]
    assert best["settings"] == trials[best["index"]]["settings"]


def test_every_parameter_is_accounted_for(document: dict[str, Any], merged_source: Path) -> None:
    from safetensors.torch import load_file

    base = load_file(merged_source / "base" / "model.safetensors")
    coverage = {entry["parameter"]: entry for entry in document["coverage"]}
    assert set(coverage) == set(base)
    assert all(entry["shape"] == list(base[name].shape) for name, entry in coverage.items())
    best = document["search"]["best"]["settings"]
    for name, entry in coverage.items():
        if entry["treatment"] == "regressed":
            setting = best[entry["module"]]
            assert (entry["lambda"], entry["gamma"]) == (setting["lambda"], setting["gamma"])
        else:
            assert (entry["lambda"], entry["gamma"], entry["condition"]) == (None, None, None), name


def test_what_it_was_made_of_is_named_by_digest(document: dict[str, Any], merged_source: Path) -> None:
    recipe = Recipe.from_yaml(merged_source / "recipe.yaml")
    inputs = fingerprint_inputs(recipe)
    assert document["recipe_digest"] == digest_json(document["recipe"]) == digest_json(recipe.document())
    assert document["base"]["digest"] == inputs.base.digest
    assert [expert["digest"] for expert in document["experts"]] == [expert.model.digest for expert in inputs.experts]
    assert [expert["labels"] for expert in document["experts"]] == [["yes", "no"]] * 3
    assert str(merged_source) not in json.dumps(document)


def test_it_is_built_again_from_the_store_alone(document: dict[str, Any], merged_source: Path) -> None:
    recipe = Recipe.from_yaml(merged_source / "recipe.yaml")
    inputs = fingerprint_inputs(recipe)
    store = Store.open(merged_source / "store")
    again = build_document(recipe, inputs, cached_results(recipe, inputs, store), Work(store))
    assert all(stage["state"] == "cached" for stage in again["stages"].values())
    assert {name: stage["key"] for name, stage in again["stages"].items()} == {
        name: stage["key"] for name, stage in document["stages"].items()
    }
    passing = ("stages", "environment", "peak_rss_bytes")
    assert {k: v for k, v in again.items() if k not in passing} == {
        k: v for k, v in document.items() if k not in passing
    }


def test_the_machine_is_described_without_naming_it() -> None:
    import platform

    found = environment()
    assert platform.node() not in json.dumps(found) or not platform.node()
    assert found["cpus"] >= 1
    assert peak_rss_bytes() > 2**20
