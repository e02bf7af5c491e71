"""SIGKILL at random moments of a night: one more night completes it, and no reader ever sees half of anything.

`BMM_KILLS` says how many moments (3 without it).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from nights import counted_night, edit, found_experts, nudge
from safetensors import safe_open

from bmm.publication import read_document
from bmm.store import Store
from tasks.champions import Champions

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("BMM_KILLS") or 3)
Standing = tuple[str | None, str | None]
# Processes that have imported everything and done nothing.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["nights", "flows.night", "bmm.stages.registry", "bmm.nightly.answers", "mlflow.store.tracking.sqlalchemy_store"]
)


def night(recipe: Path, last: int = 0, later: float = 0.0) -> dict[str, Any]:
    """Carry out a night in a process of its own; with `last`, it dies at that write or so many seconds later."""
    told = recipe.parent / "told.json"
    told.unlink(missing_ok=True)
    arguments = (str(recipe), str(recipe.parent / "store"), str(told), last, later)
    process = PROCESSES.Process(target=counted_night, args=arguments)
    process.start()
    process.join(300)
    assert process.exitcode == (-9 if last else 0)
    found: dict[str, Any] = {} if last else json.loads(told.read_text())
    return found


def seen(store: Path) -> Standing:
    found = Champions(Store.open(store), "team").standing()
    return getattr(found.champion, "number", None), getattr(found.previous, "number", None)


def read_output(output: Path) -> dict[str, str]:
    """Read a model where people look for one, and return its experts' digests."""
    document = read_document(output)
    with safe_open(output / "model.safetensors", framework="pt") as handle:
        for name in handle.keys():  # noqa: SIM118 - not a mapping
            handle.get_tensor(name)
    assert {path.stem for path in (output / "heads").glob("*.safetensors")} == {"task0", "task1", "task2"}
    return {one["name"]: one["digest"] for one in document["experts"]}


def test_a_night_that_is_killed_is_completed_by_the_next(pico: Path, tmp_path: Path) -> None:
    recipe = found_experts(pico, model="team", gate={"gain": -1, "loss": 1})
    edit(recipe, regression={"mode": "none"}, anchor={"method": "average"}, search=None, evaluation=None)
    # The registry knows its files by where they are, so a state is put back to where it was taken.
    place, store, saved = pico, pico / "store", tmp_path / "saved"
    assert night(recipe)["outcome"] == "promoted"
    old = read_output(place / "merged")
    nudge(pico / "experts" / "task1", 1.1)
    shutil.copytree(place, saved)
    second = night(recipe)
    assert second["champion"] == "2"
    assert second["writes"] > 50
    new = read_output(place / "merged")
    assert old != new
    moments = random.Random(6)
    for _ in range(KILLS):
        shutil.rmtree(place)
        shutil.copytree(saved, place)
        # At a write, or a moment after it; not so late that the night may be over.
        after = moments.randint(1, second["writes"] - 10)
        night(recipe, after, moments.choice((0.0, 0.0, 0.001)))
        # Whoever looks now sees one model or the other, whole.
        champion, previous = seen(store)
        assert (champion, previous) in (("1", None), ("1", "1"), ("2", "1")), after
        # For a moment of its replacement the folder may be away; never half.
        if (place / "merged").exists():
            assert read_output(place / "merged") in (old, new), after
        else:
            assert champion == "2", after
        said = night(recipe)
        assert said["outcome"] in ("promoted", "unchanged"), after
        assert seen(store) == ("2", "1"), after
        assert read_output(place / "merged") == new, after
        assert Champions(Store.open(store), "team").standing().move is None
        assert Store.open(store).verify() == []
        assert [path.name for path in place.iterdir() if path.name.startswith(".merged")] == []
