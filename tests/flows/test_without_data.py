"""A merge without any data, through the command line and the flow, and what the server and the tracker are told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from mlflow import MlflowClient

Command = Callable[..., Any]


def test_a_recipe_without_data_goes_through_the_flow(pico: Path, on_server: Any, bmm_here: Command) -> None:
    path, store = pico / "recipe.yaml", pico / "store"
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    recipe = {key: recipe[key] for key in ("base_model", "experts", "output", "anchor")}
    for expert in recipe["experts"]:
        del expert["task"]
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    said = bmm_here("merge", path, "--store", store, "--json")
    assert said.code == 0, said.out + said.err
    assert said.document["share_of_experts"] is None
    flow_run = on_server.last_flow_run()
    assert flow_run["state_name"] == "Completed"
    found = on_server.find("artifacts", flow_runs={"id": {"any_": [flow_run["id"]]}})
    (summary,) = [artifact for artifact in found if artifact["key"] == "bmm-merge"]
    assert "was not measured" in summary["data"]
    run = MlflowClient(f"sqlite:///{store / 'mlflow' / 'mlflow.db'}").get_run(said.document["mlflow"]["run_id"])
    assert run.data.metrics == {}
    assert run.data.params["grams.source"] == "task-vectors"
    people = bmm_here("merge", path, "--store", store, "--no-server")
    assert people.code == 0, people.err
    assert "was not measured: the recipe names no test rows" in " ".join(people.out.split())
    assert "every stage cached" in people.out
    assert json.loads((pico / "merged" / "merge.json").read_text(encoding="utf-8"))["metrics"] == {}
    refused = bmm_here("eval", pico / "merged", path, "--store", store)
    assert refused.code == 2
    assert "the recipe names no test rows" in refused.err
