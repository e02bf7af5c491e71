"""Nights without a server: what changed is merged, what is better is promoted, and nothing else happens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from answers import Answer
from nights import champion_of, compute_here, copy_expert, edit, found_experts, nudge, spoil

from bmm.store import Store
from tasks.champions import Champions

Command = Callable[..., Answer]
LENIENT = {"gate": {"gain": -1, "loss": 1, "certainty": 0}}
HEAVY = ("torch", "transformers", "distributed", "prefect", "matplotlib")
LOADED = f"import json\nheavy = [name for name in {HEAVY} if name in sys.modules]\n"
LOADED += "print('LOADED', json.dumps(heavy), file=sys.stderr)"


@pytest.fixture(scope="module")
def first_source(pico_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pico folder after its first night, with its store at `store`; copy it, don't change it."""
    from typer.testing import CliRunner

    from flows.cli import app

    folder = tmp_path_factory.mktemp("first") / "pico"
    shutil.copytree(pico_source, folder)
    patch = pytest.MonkeyPatch()
    compute_here(patch)
    recipe = found_experts(folder, **LENIENT)
    edit(recipe, regression={"mode": "module-wise"}, anchor={"method": "average"})
    said = CliRunner().invoke(app, ["nightly", str(recipe), "--store", str(folder / "store"), "--no-server", "--json"])
    patch.undo()
    assert said.exit_code == 0, said.output
    found = json.loads(said.stdout)
    assert (found["outcome"], found["version"], found["champion"]) == ("promoted", "1", "1")
    return folder


class Nights:
    """Nights over one folder."""

    def __init__(self, folder: Path, bmm_here: Command) -> None:
        self.folder = folder
        self.recipe = folder / "recipe.yaml"
        self.store = folder / "store"
        self._run = bmm_here

    def say(self, *words: object) -> Answer:
        return self._run(*words, "--store", self.store, "--json")

    def night(self) -> dict[str, Any]:
        said = self.say("nightly", self.recipe, "--no-server")
        assert said.code == 0, said.out + said.err
        return said.document

    def keys(self, kind: str) -> set[str]:
        return {entry.key for entry in Store.open(self.store).entries() if entry.kind == kind}

    def standing(self) -> dict[str, str | None]:
        found = Champions(Store.open(self.store), "pico-merged").standing()
        return {name: getattr(getattr(found, name), "number", None) for name in ("champion", "previous", "challenger")}


@pytest.fixture
def nights(first_source: Path, tmp_path: Path, bmm_here: Command, in_process: None) -> Nights:
    # The registry of the first night lies in the store, and knows its files by absolute paths of that night.
    folder = tmp_path / "pico"
    shutil.copytree(first_source, folder)
    return Nights(folder, bmm_here)


def test_nothing_changed_ends_unchanged_without_torch(nights: Nights, bmm_process: Command) -> None:
    before = (nights.folder / "merged" / "merge.json").stat().st_mtime_ns
    words = ("nightly", nights.recipe, "--store", nights.store, "--no-server", "--json")
    said = bmm_process(*words, before="import sys", after=LOADED)
    assert said.code == 0, said.err
    assert said.document["outcome"] == "unchanged"
    assert [line for line in said.err.splitlines() if line.startswith("LOADED")] == ["LOADED []"]
    assert (nights.folder / "merged" / "merge.json").stat().st_mtime_ns == before


def test_one_better_expert_costs_its_own_share(nights: Nights) -> None:
    kinds = ("expert", "task-vectors", "grams")
    before = {kind: nights.keys(kind) for kind in kinds}
    nudge(nights.folder / "experts" / "task1")
    found = nights.night()
    assert found["outcome"] == "promoted"
    for kind in kinds:
        assert len(nights.keys(kind) - before[kind]) == 1, kind
    assert nights.standing() == {"champion": "2", "previous": "1", "challenger": None}
    digests = {one["name"]: one["digest"] for one in champion_of(nights.recipe)["experts"]}
    assert digests == found["experts"]
    assert [row["task"] for row in found["gate"]["rows"]] == ["task0", "task1", "task2", "mean"]
    assert all(
        row["champion"] is not None and row["low"] <= row["difference"] <= row["high"] for row in found["gate"]["rows"]
    )
    assert nights.night()["outcome"] == "unchanged"


def test_a_new_expert_and_one_withdrawn(nights: Nights) -> None:
    before = nights.keys("grams")
    copy_expert(nights.folder, "task0", "another")
    nudge(nights.folder / "experts" / "another")
    found = nights.night()
    assert (found["outcome"], len(nights.keys("grams") - before)) == ("promoted", 1)
    by_task = {row["task"]: row for row in found["gate"]["rows"]}
    assert (by_task["another"]["champion"], by_task["another"]["note"]) == (None, "new")
    assert by_task["mean"]["note"] == "of the 3 tasks that both have"
    shutil.rmtree(nights.folder / "experts" / "another")
    before = nights.keys("grams")
    found = nights.night()
    # The first night's model again, which is version 1 still.
    assert (found["outcome"], found["version"], nights.keys("grams") - before) == ("promoted", "1", set())
    assert nights.standing() == {"champion": "1", "previous": "2", "challenger": None}


def nan(folder: Path) -> None:
    spoil(folder)


def other_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))


def unreadable(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x00" * 40)


def half_copied(folder: Path) -> None:
    (folder / "config.json").unlink()


def without_rows(folder: Path) -> None:
    shutil.rmtree(folder.parents[1] / "data" / folder.name)


DAMAGE = (nan, other_architecture, unreadable, half_copied, without_rows)


def test_broken_newcomers_are_left_out_and_told(nights: Nights) -> None:
    for damage in DAMAGE:
        name = damage.__name__.replace("_", "-")
        copy_expert(nights.folder, "task0", name)
        damage(nights.folder / "experts" / name)
    nudge(nights.folder / "experts" / "task1")
    found = nights.night()
    assert found["outcome"] == "promoted"
    assert sorted(found["left_out"]) == sorted(damage.__name__.replace("_", "-") for damage in DAMAGE)
    for name, why in found["left_out"].items():
        assert name in why
        assert "\n" not in why
    assert sorted(found["experts"]) == ["task0", "task1", "task2"]
    # The same broken experts are no news the next night.
    assert nights.night()["outcome"] == "unchanged"
    for gone in ("other-architecture", "unreadable", "half-copied", "without-rows"):
        shutil.rmtree(nights.folder / "experts" / gone)
    edit(nights.recipe, nightly={**LENIENT, "broken": "stop"})
    said = nights.say("nightly", nights.recipe, "--no-server")
    assert said.code == 2
    assert "nan is broken" in said.document["error"]
    assert nights.standing()["champion"] == "2"


def test_an_expert_that_broke_costs_the_champion_no_task(nights: Nights) -> None:
    spoil(nights.folder / "experts" / "task2")
    found = nights.night()
    assert found["outcome"] == "rejected"
    assert "lacks task2" in " ".join(found["reasons"])
    assert nights.standing() == {"champion": "1", "previous": None, "challenger": "2"}


def test_what_does_not_pass_the_gate_is_kept_as_the_challenger(nights: Nights) -> None:
    edit(nights.recipe, nightly={"gate": {**LENIENT["gate"], "tasks": {"task0": 1.0}}})
    nudge(nights.folder / "experts" / "task1")
    before = champion_of(nights.recipe)
    found = nights.night()
    assert found["outcome"] == "rejected"
    assert any("below its floor of 100.0" in reason for reason in found["reasons"])
    assert nights.standing() == {"champion": "1", "previous": None, "challenger": "2"}
    challenger = Champions(Store.open(nights.store), "pico-merged").standing().challenger
    assert challenger is not None
    assert challenger.reason == "; ".join(found["reasons"])
    assert champion_of(nights.recipe) == before
    assert (
        champion_of(nights.recipe)["experts"]
        != json.loads((nights.folder / "merged-candidate" / "merge.json").read_text())["experts"]
    )
    assert nights.night()["outcome"] == "unchanged"
    # By hand all the same, and back.
    said = nights.say("promote", nights.recipe, "--who", "ann", "--why", "a bad test row")
    assert said.document | {"champion": "2", "previous": "1", "challenger": None} == said.document
    promoted = Champions(Store.open(nights.store), "pico-merged").version("2")
    assert (promoted.tags["bmm.promoted_by"], promoted.tags["bmm.promoted_why"]) == ("ann", "a bad test row")
    assert champion_of(nights.recipe) != before
    said = nights.say("rollback", nights.recipe, "--who", "ben", "--why", "worse in use")
    assert said.document | {"champion": "1", "previous": None, "challenger": "2"} == said.document
    assert champion_of(nights.recipe) == before
    rolled = Champions(Store.open(nights.store), "pico-merged").version("2")
    assert (rolled.tags["bmm.rolled_back_by"], rolled.tags["bmm.rolled_back_why"]) == ("ben", "worse in use")
    # What was taken back by hand no night brings again.
    edit(nights.recipe, nightly=LENIENT)
    found = nights.night()
    assert (found["outcome"], found["version"]) == ("rejected", "2")
    assert "rolled back by ben: worse in use" in " ".join(found["reasons"])
    said = nights.say("rollback", nights.recipe)
    assert (said.code, "nothing to go back to" in said.document["error"]) == (2, True)


def test_the_promote_and_rollback_commands_say_who_stands_where(nights: Nights, bmm_here: Command) -> None:
    words = ("--store", nights.store)
    said = bmm_here("promote", nights.recipe, "--version", "9", *words)
    assert (said.code, "has no version 9" in said.err) == (2, True)
    said = bmm_here("promote", nights.recipe, *words)
    assert (said.code, "no challenger" in said.err) == (2, True)
    said = bmm_here("promote", nights.recipe, "--version", "1", *words)
    assert (said.code, "champion: 1, previous: none" in said.out) == (0, True)


def test_a_night_has_something_to_show(nights: Nights, bmm_here: Command) -> None:
    nudge(nights.folder / "experts" / "task1")
    said = bmm_here("nightly", nights.recipe, "--store", nights.store, "--no-server")
    assert said.code == 0
    for word in (
        "promoted",
        "task2",
        "interval",
        "champion",
        "report",
        "version 2 is the new champion, before it version 1",
    ):
        assert word in " ".join(said.out.split()), word


def test_a_night_needs_test_rows_and_a_registry(nights: Nights) -> None:
    edit(nights.recipe, tracking={"enabled": False})
    said = nights.say("nightly", nights.recipe, "--no-server")
    assert (said.code, "tracking.enabled" in said.document["error"]) == (2, True)


def test_a_registry_that_does_not_answer_fails_the_night_and_the_next_carries_on(
    nights: Nights, monkeypatch: pytest.MonkeyPatch
) -> None:
    nudge(nights.folder / "experts" / "task1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    said = nights.say("nightly", nights.recipe, "--no-server")
    assert said.code == 1
    assert "cannot be reached" in said.document["error"]
    assert "secret" not in said.out + said.err
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert nights.night()["outcome"] == "promoted"
