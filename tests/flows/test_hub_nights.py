"""Nights over an expert on a branch of a model hub, which moves, goes, and is away."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from answers import Answer
from hub_server import HubServer
from nights import champion_of, edit, found_experts, nudge

from bmm.store import Store

Command = Callable[..., Answer]
SHARES = ("expert", "task-vectors", "grams")
pytestmark = pytest.mark.slow


@pytest.fixture
def recipe(pico: Path, in_process: None) -> Path:
    """The pico folder's recipe, whose third expert is called legal and lies on the hub."""
    path = found_experts(pico, gate={"gain": -1, "loss": 1, "certainty": 0}, broken="stop")
    (pico / "experts" / "task2").rename(pico / "legal")
    (pico / "data" / "task2").rename(pico / "data" / "legal")
    said = yaml.safe_load(path.read_text(encoding="utf-8"))
    splits = {
        split: {"path": "json", "data_files": f"data/legal/{split}.jsonl"}
        for split in ("calibration", "validation", "test")
    }
    legal = {"name": "legal", "model": "org/legal@main", "task": {"max_length": 16, **splits}}
    edit(
        path,
        experts=[*said["experts"], legal],
        regression={"mode": "module-wise"},
        anchor={"method": "average"},
        search={"trials": 2},
    )
    return path


def test_a_branch_is_what_it_is_at_when_the_night_begins(
    recipe: Path, hub: HubServer, bmm_here: Command, bmm_process: Command
) -> None:
    legal, store = recipe.parent / "legal", recipe.parent / "store"
    words = ("nightly", recipe, "--store", store, "--no-server", "--json")
    commits = [hub.push("org/legal", legal)]

    def move() -> None:
        nudge(legal)
        commits.append(hub.push("org/legal", legal))

    def kinds() -> dict[str, int]:
        kept = [entry.kind for entry in Store.open(store).entries()]
        return {kind: kept.count(kind) for kind in SHARES}

    def merged_commit() -> str:
        return next(str(one["revision"]) for one in champion_of(recipe)["experts"] if one["name"] == "legal")

    hub.meanwhile = move
    said = bmm_here(*words)
    assert (said.code, said.document["outcome"], merged_commit()) == (0, "promoted", commits[0])
    before = kinds()
    said = bmm_here(*words)
    assert (said.code, said.document["outcome"], merged_commit()) == (0, "promoted", commits[1])
    assert kinds() == {kind: count + 1 for kind, count in before.items()}

    # As every process but this one finds the hub.
    said = bmm_process(*words, **hub.environment(recipe.parent / "elsewhere"))
    assert (said.code, said.document["outcome"]) == (0, "unchanged"), said.err

    del hub.repositories["org/legal"].branches["main"]
    said = bmm_here(*words)
    assert said.code == 2
    assert "legal is broken (the expert legal:" in said.document["error"]
    assert "the hub has no revision 'main' of 'org/legal'" in said.document["error"]

    hub.close()
    said = bmm_here(*words)
    assert said.code == 2
    assert "the hub could not be reached for 'org/legal'" in said.document["error"]
    assert merged_commit() == commits[1]
