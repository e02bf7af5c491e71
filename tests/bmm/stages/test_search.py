"""The search stage on pico experts: every hyperparameter and objective, budgets, workers, and studies that go on."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from bmm.errors import RecipeError, StoreAwayError
from bmm.pipeline import perform_here, run_stages
from bmm.recipe import Recipe
from bmm.sources import fingerprint_inputs
from bmm.stages.objective import Objective
from bmm.store import Store

UPTO_SEARCH = ("experts", "task-vectors", "grams", "anchor", "search")
Edit = Callable[..., Path]
MODULE_WISE = {"mode": "module-wise"}


def searched(folder: Path) -> tuple[dict[str, Any], bytes]:
    """What `search.json` says, and the merged encoder's bytes."""
    recipe = Recipe.from_yaml(folder / "recipe.yaml")
    store = Store.open(folder / "store")
    results = run_stages(recipe, fingerprint_inputs(recipe), store, perform_here, UPTO_SEARCH)
    found = store.read(results["search"].reference("search"))
    return found.read_json("search.json"), (found.path / "model.safetensors").read_bytes()


@pytest.fixture
def evaluations(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was evaluated in this process."""
    asked: list[Any] = []
    evaluate = Objective.evaluate

    def noted(self: Objective, assembler: Any, chosen: Any, rival: Any) -> Any:
        asked.append(chosen)
        return evaluate(self, assembler, chosen, rival)

    monkeypatch.setattr(Objective, "evaluate", noted)
    return asked


def test_a_larger_budget_carries_on_and_ends_as_one_go_would(
    merged: Path, edit_recipe: Edit, in_process: None, evaluations: list[Any]
) -> None:
    edit_recipe(merged, search={"per": "model", "trials": 14, "racing": False})
    whole, weights = searched(merged)
    assert len(evaluations) == len(whole["trials"]) == 14
    for trials in (4, 9, 14):
        # A store that has seen none of this.
        edit_recipe(merged, search={"per": "model", "trials": trials, "racing": False, "seed": 5})
        grown, _ = searched(merged)
    assert len(evaluations) == 28
    assert len(grown["trials"]) == 14
    edit_recipe(merged, search={"per": "model", "trials": 7, "racing": False, "seed": 5})
    shorter, _ = searched(merged)
    assert len(evaluations) == 28
    assert shorter["trials"] == grown["trials"][:7]
    other = Store.open(merged / "other")
    recipe = Recipe.from_yaml(edit_recipe(merged, search={"per": "model", "trials": 14, "racing": False, "seed": 5}))
    results = run_stages(recipe, fingerprint_inputs(recipe), other, perform_here, UPTO_SEARCH)
    assert other.read(results["search"].reference("search")).read_json("search.json") == grown
    assert weights


def test_a_search_that_broke_off_goes_on_under_another_budget(
    merged: Path, edit_recipe: Edit, in_process: None, evaluations: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def search(trials: int) -> None:
        edit_recipe(merged, search={"per": "model", "trials": trials, "racing": False, "seed": 7})

    counted = Objective.evaluate

    def broken(self: Objective, assembler: Any, chosen: Any, rival: Any) -> Any:
        if len(evaluations) == 5:
            raise StoreAwayError("the store is not where it was")
        return counted(self, assembler, chosen, rival)

    search(12)
    with monkeypatch.context() as away:
        away.setattr(Objective, "evaluate", broken)
        with pytest.raises(StoreAwayError):
            searched(merged)
    assert len(evaluations) == 5
    search(9)
    found, _ = searched(merged)
    assert (len(evaluations), len(found["trials"])) == (9, 9)
    # Its own log has five trials, the study that was kept has nine.
    search(12)
    more, _ = searched(merged)
    assert (len(evaluations), len(more["trials"])) == (12, 12)
    assert more["trials"][:9] == found["trials"]


def test_budgets_end_a_search_and_say_so(merged: Path, edit_recipe: Edit, in_process: None) -> None:
    edit_recipe(merged, search={"per": "model", "trials": 12, "evaluations": 3})
    assert (searched(merged)[0]["ended"], len(searched(merged)[0]["trials"])) == ("evaluations", 3)
    edit_recipe(merged, search={"per": "model", "trials": 12, "minutes": 1e-9, "seed": 1})
    found, _ = searched(merged)
    assert (found["ended"], [trial["origin"] for trial in found["trials"]]) == ("minutes", ["anchor"])


@pytest.mark.parametrize("objective", ["nll", "agreement"])
def test_smooth_objectives_are_what_they_say(merged: Path, edit_recipe: Edit, in_process: None, objective: str) -> None:
    edit_recipe(merged, search={"per": "model", "trials": 5, "objective": objective, "racing": False})
    found, _ = searched(merged)
    values = [trial["objective"] for trial in found["trials"]]
    assert all(value <= 0 for value in values)
    # It moves with every setting, where a share of right rows stands still.
    assert len(set(values)) == 5
    assert all(trial["variance"] > 0 for trial in found["trials"])
    assert found["split"] == "validation"
    assert values[found["best"]["index"]] >= values[0]


def test_rows_without_labels_steer_a_search(merged: Path, edit_recipe: Edit, in_process: None) -> None:
    path = merged / "recipe.yaml"
    recipe = yaml.safe_load(path.read_text())
    for expert in recipe["experts"]:
        source = expert["task"].pop("validation")
        rows = [json.loads(line) for line in (merged / source["data_files"]).read_text().splitlines()]
        target = merged / f"{expert['name']}-unlabelled.jsonl"
        target.write_text("".join(json.dumps({"text": row["text"]}) + "\n" for row in rows))
        expert["task"]["unlabelled"] = {"path": "json", "data_files": target.name, "split": "train"}
    recipe["search"] = {"per": "model", "trials": 3, "objective": "agreement"}
    path.write_text(yaml.safe_dump(recipe))
    found, _ = searched(merged)
    assert found["split"] == "unlabelled"
    assert set(found["expert"].values()) == {1.0}
    assert all(0 < value <= 1 for trial in found["trials"] for value in trial["tasks"].values())
    # The same rows with labels give the same agreement: labels are not looked at.
    for expert in recipe["experts"]:
        del expert["task"]["unlabelled"]
        expert["task"]["validation"] = {
            "path": "json",
            "data_files": f"data/{expert['name']}/validation.jsonl",
            "split": "train",
        }
    path.write_text(yaml.safe_dump(recipe))
    labelled, _ = searched(merged)
    assert [trial["objective"] for trial in labelled["trials"]] == [trial["objective"] for trial in found["trials"]]
    recipe["search"]["objective"] = "nll"
    for expert in recipe["experts"]:
        del expert["task"]["validation"]
        expert["task"]["unlabelled"] = {"path": "json", "data_files": f"{expert['name']}-unlabelled.jsonl"}
    path.write_text(yaml.safe_dump(recipe))
    with pytest.raises(RecipeError, match="needs validation rows"):
        searched(merged)


def test_the_blend_and_task_weights_are_searched_over_hybrid_grams(
    merged: Path, edit_recipe: Edit, in_process: None
) -> None:
    edit_recipe(
        merged,
        grams={"source": "hybrid", "rho": 0.4},
        regression=MODULE_WISE,
        search={
            "per": "type",
            "trials": 18,
            "rho": [0, 1],
            "task_weights": [0.5, 2],
            "tied": ["rho", "task_weights"],
            "groups": {"mlp-in": {"log10_lambda": -1, "gamma": 1}},
            "objective": "nll",
        },
    )
    found, _ = searched(merged)
    assert found["trials"][1]["settings"]["qkv"]["rho"] == 0.4
    for trial in found["trials"][1:]:
        settings = trial["settings"]
        assert (settings["mlp-in"]["lambda"], settings["mlp-in"]["gamma"]) == (0.1, 1.0)
        data = [setting for setting in settings.values() if setting["lambda"] is not None]
        assert len({json.dumps([setting["rho"], setting["task_weights"]]) for setting in data}) == 1
        assert set(data[0]["task_weights"]) == {"task0", "task1", "task2"}
    assert len({trial["settings"]["mlp-in"]["rho"] for trial in found["trials"][1:]}) > 2
    names = {entry["name"] for entry in found["importance"]}
    assert {"ρ of all", "weight of task0 of all", "λ of qkv"} <= names or not names
    assert "λ of mlp-in" not in names


def test_a_group_that_is_not_there_is_named(merged: Path, edit_recipe: Edit, in_process: None) -> None:
    edit_recipe(merged, search={"per": "depth", "trials": 4, "groups": {"query": {"gamma": 1}}})
    with pytest.raises(RecipeError, match="no module group 'query'; the groups are early, late"):
        searched(merged)
    edit_recipe(merged, search={"per": "model", "trials": 4, "log10_lambda": -1, "gamma": 1})
    with pytest.raises(RecipeError, match="nothing to search"):
        searched(merged)


def test_floors_and_the_worst_task(merged: Path, edit_recipe: Edit, in_process: None) -> None:
    edit_recipe(
        merged, search={"per": "model", "trials": 13, "floors": {"all": 0.5, "task1": 0.6}, "also": "worst-task"}
    )
    found, _ = searched(merged)
    assert found["floors"] == {"task0": 0.5, "task1": 0.6, "task2": 0.5}
    assert "bayesian" in {trial["origin"] for trial in found["trials"]}
    shares = [
        min(trial["tasks"][task] / expert for task, expert in found["expert"].items()) for trial in found["trials"]
    ]
    front = found["pareto"]
    assert front
    assert max(shares) == pytest.approx(shares[front[-1]])
    best = found["trials"][found["best"]["index"]]["tasks"]
    assert all(best[task] / found["expert"][task] >= floor for task, floor in found["floors"].items())


def test_a_race_that_is_lost_ends_early_and_what_is_chosen_is_as_good(
    merged: Path, edit_recipe: Edit, in_process: None
) -> None:
    space = {"per": "model", "trials": 9, "objective": "nll", "log10_lambda": [-6, 2], "gamma": [-1, 3]}
    edit_recipe(merged, search={**space, "racing": False})
    whole, _ = searched(merged)
    edit_recipe(merged, search=space)
    raced, _ = searched(merged)
    stopped = [trial for trial in raced["trials"] if trial["state"] == "stopped"]
    assert stopped
    assert all(trial["seen"] < 1 for trial in stopped)
    chosen = whole["trials"][whole["best"]["index"]]
    assert raced["best"]["objective"] > chosen["objective"] - 2 * math.sqrt(chosen["variance"])
    for trial in stopped:
        true = whole["trials"][trial["index"]]
        if true["settings"] == trial["settings"]:
            spread = math.sqrt(trial["variance"])
            assert abs(trial["objective"] - true["objective"]) < 4 * spread


@pytest.mark.slow
def test_workers_find_what_this_process_would(
    merged: Path, edit_recipe: Edit, dask_scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_recipe(
        merged,
        search={"per": "model", "trials": 13, "parallel": 2, "objective": "nll"},
        cluster={"scheduler": dask_scheduler},
    )
    there, weights = searched(merged)

    def here(work: Any, request: Any, stack: Any, digest: str) -> Any:
        from bmm.stages.request import Request
        from bmm.stages.trial_part import TrialRequest, as_outcome, trial_outcome

        # A worker measures one setting at a time.
        lock = threading.Lock()

        def evaluate(chosen: Any, rival: Any) -> Any:
            said = {group: setting.to_json() for group, setting in chosen.items()}
            rows = None if rival is None else {task: gains.tolist() for task, gains in rival.items()}
            asked = TrialRequest(digest, Request.to_json(request), work.store.location, said, rows)
            with lock:
                return as_outcome(json.loads(json.dumps(trial_outcome(vars(asked)))))

        return evaluate

    for entry in Store.open(merged / "store").entries():
        if entry.kind in ("search", "stage-search", "study"):
            Store.open(merged / "store").discard(entry.kind, entry.key)
    monkeypatch.setattr("bmm.stages.search._at_workers", here)
    assert searched(merged) == (there, weights)


def test_the_anchors_trial_is_the_anchor_after_several_rounds_too(
    merged: Path, edit_recipe: Edit, in_process: None
) -> None:
    found = []
    for rounds in (1, 2):
        search = {"per": "model", "trials": 1, "objective": "nll"}
        edit_recipe(merged, search=search, regression={"rounds": rounds, "heads": "keep"})
        said, weights = searched(merged)
        found.append((said["trials"][0]["objective"], weights))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert found[1][1] == found[0][1]


def walks(folder: Path) -> set[str]:
    return {entry.key for entry in Store.open(folder / "store").entries() if entry.kind == "walk"}


def test_a_walk_of_every_trial_is_that_of_a_merge_with_its_strengths(
    merged: Path, edit_recipe: Edit, in_process: None
) -> None:
    """Equal strengths give the plain walk's own artefacts; others begin at the first layer that differs."""
    edit_recipe(merged, search={"per": "type", "trials": 12, "walk": "every-trial", "objective": "nll"})
    before = walks(merged)
    found, weights = searched(merged)
    assert {setting["gamma"] for trial in found["trials"] for setting in trial["settings"].values()} == {1.0}
    line = [trial for trial in found["trials"] if trial["origin"] == "global"]
    # The walk's own strength was walked already; each other one is three layers.
    assert len(walks(merged) - before) >= 3 * (len(line) - 1)
    assert len({trial["objective"] for trial in line}) == len(line)
    # What a merge with that one strength publishes is what the trial measured.
    for trial in line[:3]:
        edit_recipe(
            merged,
            search=None,
            regression={"lambda": trial["settings"]["qkv"]["lambda"]},
        )
        known = walks(merged)
        searched(merged)
        assert walks(merged) == known
    best = found["trials"][found["best"]["index"]]["settings"]
    if len({setting["lambda"] for setting in best.values()}) == 1 and best["qkv"]["lambda"] is not None:
        edit_recipe(merged, search=None, regression={"lambda": best["qkv"]["lambda"]})
        assert searched(merged)[1] == weights


def test_a_changed_layer_is_walked_from_there_on(merged: Path, edit_recipe: Edit, in_process: None) -> None:
    from bmm.prediction import StoredWeights
    from bmm.requests import Requests
    from bmm.stages.propagation import walk
    from bmm.stages.request import Work
    from bmm.stages.setup import setup_of

    recipe = Recipe.from_yaml(edit_recipe(merged, search={"per": "type", "trials": 3, "walk": "every-trial"}))
    inputs, store = fingerprint_inputs(recipe), Store.open(merged / "store")
    results = run_stages(recipe, inputs, store, perform_here, UPTO_SEARCH[:-1])
    request = Requests(recipe, inputs).build("search", results)
    work = Work(store)
    setup = setup_of(work, request)
    anchored = StoredWeights(work.read(request.inputs["anchor"]))
    plain = {map_.module: 0.1 for map_ in setup.regressed}
    first = walk(work, request, setup, anchored, plain)
    assert work.made == 0
    last = [map_.module for map_ in setup.regressed if map_.layer == 1][-1]
    second = walk(work, request, setup, anchored, {**plain, last: 5.0})
    # The second layer and the pooler behind it.
    assert work.made == 2
    for map_ in setup.regressed:
        same = first.solved(map_.module).solution.equal(second.solved(map_.module).solution)
        assert same == (map_.layer == 0 or (map_.layer == 1 and map_.module != last)), map_.module
    kept = walk(work, request, setup, anchored, {**plain, last: math.inf})
    anchor = next(map_ for map_ in setup.regressed if map_.module == last).matrix(anchored)
    assert kept.solved(last).solution.equal(anchor.to(kept.solved(last).solution.dtype))
    assert kept.lambdas[last] == math.inf
