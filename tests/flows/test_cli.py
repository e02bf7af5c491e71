"""The `bmm` command: help, JSON, exit codes, and what each command says of a finished merge."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from bmm.pipeline import STAGES
from flows.running import run as _run

Command = Callable[..., Any]
Finished = tuple[Path, Path, Any]
Place = tuple[Path, Path]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], ["demo", "init", "plan", "merge", "grams", "eval", "report", "track", "store", "schema"]),
        (["demo"], ["FOLDER", "--zoo", "--experts", "--json"]),
        (["init"], ["DIR", "--force", "--json"]),
        (["plan"], ["RECIPE", "--offline", "--config", "--store", "--json", "refuse"]),
        (["merge"], ["RECIPE", "--store", "--fresh", "--resume", "--no-server", "--json"]),
        (["grams"], ["RECIPE", "--output", "--store", "--json", "Gram"]),
        (["eval"], ["MODEL", "RECIPE", "--split", "--samples", "--seed", "--json"]),
        (["nightly"], ["RECIPE", "--store", "--no-server", "--json"]),
        (["deploy"], ["RECIPE", "--serve", "--pool", "--store", "--json"]),
        (["promote"], ["RECIPE", "--version", "--who", "--why", "--json"]),
        (["rollback"], ["RECIPE", "--who", "--why", "--json"]),
        (["report"], ["RUN", "--store", "--json", "report.html"]),
        (["schema"], ["JSON Schema"]),
        (["store"], ["ls", "verify", "prune"]),
        (["store", "ls"], ["--store", "--json"]),
        (["store", "verify"], ["--store", "--json", "--no-mend", "damaged"]),
        (["store", "prune"], ["--older-than", "--keep-runs", "--max-bytes", "--no-registry", "--dry-run", "--copies"]),
        (["track"], ["--store", "--any-tracker", "--json"]),
    ],
)
def test_help_names_what_a_command_takes(
    words: list[str], named: list[str], bmm_here: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    said = bmm_here(*words, "--help")
    assert said.code == 0
    assert [name for name in named if name.lower() not in said.out.lower()] == []


def test_an_offline_plan_says_what_holds_and_what_is_open(pico: Path, bmm_here: Command, tmp_path: Path) -> None:
    recipe = pico / "recipe.yaml"
    found = bmm_here("plan", "--offline", recipe, "--json").document
    assert found["checked"]
    assert found["not_checked"]
    said = bmm_here("plan", "--offline", recipe)
    assert (said.code, "holds" in said.out, "open" in said.out) == (0, True, True)
    assert "a walk" in said.out
    assert [stage["stage"] for stage in found["estimate"]["stages"]] == list(STAGES)
    config = pico / "wide.json"
    config.write_text((pico / "base" / "config.json").read_text().replace('"hidden_size": 16', '"hidden_size": 64'))
    wider = bmm_here("plan", "--offline", "--config", config, recipe, "--json").document["estimate"]
    assert wider["disk_bytes"] > 2 * found["estimate"]["disk_bytes"]
    assert bmm_here("plan", "--config", config, recipe).code == 2
    recipe.write_text(recipe.read_text().replace("./experts/task1", "./experts/task9"))
    said = bmm_here("plan", "--offline", recipe)
    assert said.code == 2
    assert "the expert task1" in said.err
    assert not (tmp_path / "store").exists()


def test_every_command_prints_one_json_document(done: Place, bmm_here: Command, tmp_path: Path) -> None:
    folder, store = done
    recipe = folder / "recipe.yaml"
    commands: dict[str, tuple[object, ...]] = {
        "stages": ("plan", recipe),
        "output": ("merge", recipe, "--no-server"),
        "experts": ("grams", recipe),
        "share_of_experts": ("eval", folder / "base", recipe),
        "report": ("report", folder / "merged"),
        "artefacts": ("store", "ls"),
        "checked": ("store", "verify"),
        "leftovers": ("store", "prune"),
    }
    for key, words in commands.items():
        said = bmm_here(*words, "--store", store, "--json")
        assert said.code == 0, said.out + said.err
        assert key in said.document
        assert said.complaints == []
    said = bmm_here("schema", "--json")
    assert {"base_model", "experts", "output"} <= said.document["properties"].keys()
    assert bmm_here("schema").document == said.document


def test_every_command_has_something_to_show(done: Place, bmm_here: Command) -> None:
    folder, store = done
    recipe = folder / "recipe.yaml"
    for words, shown in (
        (("plan", recipe), "cached"),
        (("merge", recipe, "--no-server"), "every stage cached"),
        (("grams", recipe), "task1"),
        (("eval", folder / "merged", recipe), "task1"),
        (("report", recipe), "report.html"),
        (("store", "ls"), "gram"),
        (("store", "verify"), "0 damaged"),
        (("store", "prune", "--dry-run"), "would remove 0 artefacts"),
    ):
        said = bmm_here(*words, "--store", store)
        assert said.code == 0, said.out + said.err
        assert shown in said.out


def test_eval_samples_compares_draws_with_the_merged_model(done: Place, bmm_here: Command) -> None:
    folder, store = done
    recipe = folder / "recipe.yaml"
    words = ("eval", folder / "merged", recipe, "--store", store)
    plain = bmm_here(*words, "--json").document
    assert "samples" not in plain
    said = bmm_here(*words, "--samples", 2, "--seed", 4, "--json")
    assert said.code == 0, said.out + said.err
    assert {key: value for key, value in said.document.items() if key != "samples"} == plain
    found = said.document["samples"]
    assert (found["count"], found["seed"], found["bins"]) == (2, 4, 15)
    for when in ("before", "after"):
        assert found[when]["tasks"].keys() == plain["tasks"].keys()
        for task, entry in found[when]["tasks"].items():
            # The merged model's own answers, whichever way they are asked for.
            assert entry["posterior_mean"]["accuracy"]["value"] == plain["tasks"][task]["model"]
    figure = folder / "merged" / "reliability-test.png"
    assert found["figure"] == str(figure)
    assert figure.read_bytes().startswith(b"\x89PNG")
    for when, model in product(("before", "after"), ("posterior_mean", "sampled")):
        bins = found["reliability"][when][model]
        right = sum(entry["share"] * entry["accuracy"] for entry in bins)
        assert right == pytest.approx(found[when]["mean"][model]["accuracy"]["value"])
    made = len(list((store / "artefacts" / "predictions").iterdir()))
    assert bmm_here(*words, "--samples", 2, "--seed", 4, "--json").document == said.document
    shown = bmm_here(*words, "--samples", 1, "--seed", 4)
    assert shown.code == 0
    assert "ECE" in shown.out
    assert len(list((store / "artefacts" / "predictions").iterdir())) == made
    # Without --seed it is the recipe's.
    assert bmm_here(*words, "--samples", 1, "--json").document["samples"]["seed"] == 0


def test_eval_samples_refuses_what_has_no_posterior(done: Place, bmm_here: Command, tmp_path: Path) -> None:
    folder, store = done
    recipe = folder / "recipe.yaml"
    for words, reason in (
        ((folder / "base", recipe, "--samples", 2, "--store", store), "not its output"),
        ((folder / "merged", recipe, "--samples", 2, "--store", tmp_path / "empty"), "bmm merge"),
        ((folder / "merged", recipe, "--seed", 2, "--store", store), "--samples"),
    ):
        said = bmm_here("eval", *words)
        assert said.code == 2
        (line,) = said.complaints
        assert reason in line
    assert bmm_here("eval", folder / "merged", recipe, "--samples", 0, "--store", store).code == 2


def test_exit_codes(done: Place, bmm_here: Command, tmp_path: Path) -> None:
    folder, store = done
    missing = bmm_here("merge", tmp_path / "no.yaml", "--store", store)
    assert missing.code == 2
    assert missing.out == ""
    (line,) = missing.complaints
    assert "no.yaml" in line
    asked = bmm_here("plan", tmp_path / "no.yaml", "--store", store, "--json")
    assert (asked.code, asked.document["exit_code"]) == (2, 2)
    assert bmm_here("merge", "--no-such-option").code == 2
    assert bmm_here("eval", tmp_path / "nothing", folder / "recipe.yaml", "--store", store).code == 2
    assert bmm_here("eval", "x" * 5000, folder / "recipe.yaml", "--store", store).code == 2
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    grams = bmm_here("grams", folder / "recipe.yaml", "--output", tmp_path / "file", "--store", tmp_path / "never")
    assert grams.code == 2
    assert not (tmp_path / "never").exists()
    assert bmm_here("report", tmp_path, "--store", store).code == 2
    damaged = sorted((store / "artefacts" / "model").glob("*/config.json"))[0]
    damaged.write_text("{}", encoding="utf-8")
    said = bmm_here("store", "verify", "--store", store, "--json")
    assert said.code == 1
    assert [entry["kind"] for entry in said.document["damaged"]] == ["model"]


def test_numbers_that_are_not_finite_are_a_sentence_too(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> dict[str, Any]:
        raise FloatingPointError("the logits of news are not finite")

    with pytest.raises(typer.Exit) as ended:
        _run(work, as_json=True, show=lambda _: None)
    assert ended.value.exit_code == 1
    assert json.loads(capsys.readouterr().out) == {"error": "the logits of news are not finite", "exit_code": 1}


def test_plan_grams_and_merge_follow_each_other(
    finished: Finished, bmm_here: Command, edit_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    folder, store = finished[0], tmp_path / "store"
    place = tmp_path / "pico.yaml"
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    recipe["base_model"] = str(folder / "base")
    for expert in recipe["experts"]:
        expert["model"] = str(folder / expert["model"])
        for split in ("calibration", "validation", "test"):
            expert["task"][split]["data_files"] = str(folder / expert["task"][split]["data_files"])
    three = recipe["experts"]

    def write(**changes: Any) -> Path:
        place.write_text(yaml.safe_dump({**recipe, "output": str(tmp_path / "merged"), **changes}), encoding="utf-8")
        return place

    def grams_of() -> dict[str, float]:
        listed = bmm_here("store", "ls", "--store", store, "--json").document["artefacts"]
        assert "gram-shard" not in {entry["kind"] for entry in listed}
        return {entry["key"]: entry["made"] for entry in listed if entry["kind"] == "grams"}

    def planned() -> list[bool]:
        found = bmm_here("plan", place, "--store", store, "--json").document
        assert [stage["stage"] for stage in found["stages"]] == list(STAGES)
        return [stage["cached"] for stage in found["stages"]]

    write(experts=three[:2])
    assert planned() == [False] * 7
    assert not store.exists()
    first = bmm_here("grams", place, "--store", store, "--json").document
    assert first["state"] == "ran"
    assert [entry["expert"] for entry in first["experts"]] == ["task0", "task1"]
    assert planned() == [True] * 3 + [False] * 4
    made = grams_of()
    assert {entry["key"] for entry in first["experts"]} == made.keys()
    # Published, they serve a store that has never seen them.
    said = bmm_here("grams", place, "--store", store, "--output", tmp_path / "grams")
    assert (said.code, "published in" in said.out) == (0, True)
    write(experts=three[:2], grams={"source": "artifact", "path": str(tmp_path / "grams")}, regression={})
    there = bmm_here("grams", place, "--store", tmp_path / "there", "--json").document
    assert [entry["digest"] for entry in there["experts"]] == [entry["digest"] for entry in first["experts"]]
    assert (there["source"], there["output"]) == ("artifact", None)
    # Another recipe with the same experts and data computes no Gram matrix, and uses these.
    write(experts=three[:2], anchor={"method": "average"})
    merged = bmm_here("merge", place, "--store", store, "--no-server", "--json").document
    assert {stage: entry["state"] for stage, entry in merged["stages"].items()} == {
        **dict.fromkeys(STAGES[:3], "cached"),
        **dict.fromkeys(STAGES[3:], "ran"),
    }
    assert grams_of() == made
    assert planned() == [True] * 7
    # One more expert costs its own Gram matrices, no other's.
    write()
    second = bmm_here("grams", place, "--store", store, "--json").document
    assert second["state"] == "ran"
    assert {key: moment for key, moment in grams_of().items() if key in made} == made
    assert len(grams_of()) == 3


def test_eval_agrees_with_the_merge(done: Place, bmm_here: Command) -> None:
    folder, store = done
    measured = json.loads((folder / "merged" / "merge.json").read_text(encoding="utf-8"))["metrics"]
    words = (folder / "recipe.yaml", "--store", store, "--json")
    for model, column in (("merged", "merged"), ("base", "base")):
        for split in ("test", "validation"):
            found = bmm_here("eval", folder / model, *words, "--split", split).document
            assert {task: entry["model"] for task, entry in found["tasks"].items()} == {
                task: measured[split][task][column] for task in ("task0", "task1", "task2")
            }
            assert found["share_of_experts"]["mean"] == measured[split]["mean"]["share_of_experts"][column]
    found = bmm_here("eval", folder / "experts" / "task1", *words).document
    assert found["tasks"]["task1"]["model"] == measured["test"]["task1"]["expert"]


@pytest.mark.parametrize("run", ["merged", "recipe.yaml"])
def test_report_is_rebuilt(run: str, done: Place, bmm_here: Command) -> None:
    folder, store = done
    page = folder / "merged" / "report.html"
    page.unlink()
    said = bmm_here("report", folder / run, "--store", store, "--json")
    assert said.code == 0, said.out + said.err
    assert Path(said.document["report"]) == page
    assert "task1" in page.read_text(encoding="utf-8")


def test_report_of_a_recipe_that_was_not_merged(done: Place, bmm_here: Command, tmp_path: Path) -> None:
    said = bmm_here("report", done[0] / "recipe.yaml", "--store", tmp_path / "empty")
    assert said.code == 2
    assert "has not been merged yet" in said.err


def test_verify_names_the_stage_and_mends(done: Place, bmm_here: Command) -> None:
    _, store = done
    damaged = sorted((store / "artefacts" / "anchor").glob("*/treatments.json"))[0]
    damaged.write_text("{}", encoding="utf-8")
    words = ("store", "verify", "--store", store)
    left = bmm_here(*words, "--no-mend", "--json")
    ((said,), code) = (left.document["damaged"], left.code)
    assert (code, said["kind"], said["made_by"], said["removed"]) == (1, "anchor", "anchor", False)
    people = bmm_here(*words)
    assert people.code == 1
    assert "removed; the stage anchor makes it again" in " ".join(people.out.split())
    assert not damaged.parent.exists()
    again = bmm_here(*words)
    assert (again.code, "0 damaged" in again.out) == (0, True)


def test_prune_by_count_and_by_bytes(done: Place, bmm_here: Command) -> None:
    _, store = done
    words = ("store", "prune", "--store", store, "--json")
    kept = bmm_here(*words, "--keep-runs", "1").document
    assert (kept["artefacts"], kept["protected"]) == (0, 0)
    size = kept["left_bytes"]
    some = bmm_here(*words, "--max-bytes", f"{size // 2}B", "--dry-run").document
    assert 0 < some["artefacts"] < len(bmm_here("store", "ls", "--store", store, "--json").document["artefacts"])
    assert {one["why"] for one in some["removed"]} == {"bytes"}
    assert some["left_bytes"] + some["bytes"] == size
    assert some["left_bytes"] <= size // 2
    everything = bmm_here(*words, "--keep-runs", "0").document
    assert {one["why"] for one in everything["removed"]} == {"runs"}
    assert {one["kind"] for one in everything["removed"]} >= {"run", "model", "walk", "predictions"}
    for wrong in (("--max-bytes", "many"), ("--copies", "--keep-runs", "1")):
        refused = bmm_here("store", "prune", "--store", store, *wrong)
        assert (refused.code, len(refused.complaints)) == (2, 1)


def test_prune_removes_what_is_old(done: Place, bmm_here: Command) -> None:
    folder, store = done
    words = ("store", "prune", "--older-than", "0", "--store", store, "--json")
    would = bmm_here(*words, "--dry-run").document
    assert would["artefacts"] > 10
    assert bmm_here("store", "prune", "--store", store, "--json").document["artefacts"] == 0
    assert bmm_here(*words).document["artefacts"] == would["artefacts"]
    assert bmm_here("store", "ls", "--store", store, "--json").document["artefacts"] == []
    assert (folder / "merged" / "config.json").is_file()


def test_an_unreachable_tracker_costs_nothing_and_shows_no_password(
    done: Place, on_server: Any, bmm_here: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, store = done
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    said = bmm_here("merge", folder / "recipe.yaml", "--store", store, "--json")
    assert said.code == 0, said.out + said.err
    assert said.document["mlflow"] is None
    assert "127.0.0.1" in said.document["mlflow_error"]
    flow_run = on_server.last_flow_run()
    assert flow_run["state_name"] == "Completed"
    told = [said.out, said.err, json.dumps(on_server.task_runs(flow_run)), json.dumps(flow_run)]
    told += [json.dumps(on_server.find("logs", sort="TIMESTAMP_ASC"))]
    told += [(folder / "merged" / name).read_text() for name in ("merge.json", "report.html", "README.md")]
    assert [text[:80] for text in told if "secret" in text] == []
    people = bmm_here("merge", folder / "recipe.yaml", "--store", store, "--no-server")
    assert people.code == 0
    assert "not logged" in people.out
    assert "secret" not in people.out + people.err
    # What waits is for that tracker; a merge with another one, which answers, writes its own record.
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    again = bmm_here("merge", folder / "recipe.yaml", "--store", store, "--no-server", "--json")
    assert again.document["mlflow"]["run_id"]
    assert (again.document["mlflow_error"], again.document["mlflow_sent_later"]) == (None, 0)
    left = bmm_here("track", "--store", store, "--json").document
    assert (left["sent"], [one["tracker"] for one in left["waiting"]]) == ([], ["http://127.0.0.1:9"])
