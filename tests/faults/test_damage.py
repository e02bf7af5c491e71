"""Damage to what a finished merge keeps: noticed, named by `bmm store verify`, and mended by one stage alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bmm.pipeline import STAGES
from bmm.store import Entry, Store
from bmm.stores.manifest import MANIFEST
from tests.faults.conftest import Bmm, assert_no_halves, change, model_files

pytestmark = pytest.mark.slow

MADE_BY = {
    "layout": "experts",
    "expert": "experts",
    "task-vectors": "task-vectors",
    "grams": "grams",
    "anchor": "anchor",
    "search": "search",
    "evaluation": "evaluate",
    "model": "publish",
}
"""The stage that makes each kind of artefact that a later run still needs."""


def delete(path: Path) -> None:
    """Remove a file."""
    path.unlink()


def truncate(path: Path) -> None:
    """Take away the second half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    """Turn one bit over in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


DAMAGES: dict[str, Callable[[Path], None]] = {"delete": delete, "truncate": truncate, "flip": flip}


@pytest.fixture(scope="module")
def merged(finished: tuple[Path, Path], scheduler: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A copy of a finished merge, whose Grams are computed by workers that are there already."""
    folder = tmp_path_factory.mktemp("merged")
    shutil.copytree(finished[0], folder / "pico")
    shutil.copytree(finished[1], folder / "store")
    change(folder / "pico", lambda recipe: recipe.update(cluster={"scheduler": scheduler}))
    return folder / "pico", folder / "store"


def of_kind(store: Path, kind: str) -> list[Entry]:
    """Return the artefacts of one kind."""
    found = [entry for entry in Store.open(store).entries() if entry.kind == kind]
    assert found, f"the store has no artefact of the kind {kind}"
    return found


def largest(entry: Entry) -> Path:
    """Return an artefact's largest file that is not its manifest."""
    files = [path for path in entry.path.rglob("*") if path.is_file() and path.name != MANIFEST]
    return max(files, key=lambda path: (path.stat().st_size, path.name))


def assert_mended(bmm: Bmm, merged: tuple[Path, Path], finished: Path, ran: str | None) -> None:
    """Assert that a merge runs one stage alone (or none), and that everything is as it was."""
    pico, store = merged
    states = bmm("merge", pico / "recipe.yaml", "--no-server", "--store", store, "--json").states()
    assert {stage for stage in STAGES if states[stage] == "ran"} == ({ran} if ran else set())
    assert model_files(pico / "merged") == model_files(finished)
    assert bmm("store", "verify", "--store", store).code == 0
    assert_no_halves(store)


def assert_named(bmm: Bmm, store: Path, entry: Entry) -> None:
    """Assert that `bmm store verify` names one artefact, in words and in JSON, and exits with 1."""
    said = bmm("store", "verify", "--no-mend", "--store", store)
    assert said.code == 1
    assert f"the {entry.kind} artefact {entry.key[:12]}" in said.out
    found = bmm("store", "verify", "--no-mend", "--store", store, "--json")
    assert found.code == 1
    assert [(item["kind"], item["key"]) for item in found.document["damaged"]] == [(entry.kind, entry.key)]
    made_by = {**MADE_BY, "predictions": "evaluate"}.get(entry.kind, entry.kind.removeprefix("stage-"))
    assert found.document["damaged"][0]["made_by"] == made_by


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", MADE_BY)
def test_a_damaged_artefact_is_made_again_by_its_stage_alone(
    kind: str, damage: str, merged: tuple[Path, Path], finished: tuple[Path, Path], bmm: Bmm
) -> None:
    entry = of_kind(merged[1], kind)[-1]
    if kind == "anchor":
        # The merge's own, not one that evaluation compares with.
        entry = next(item for item in of_kind(merged[1], kind) if '"wudi"' in (item.path / MANIFEST).read_text())
    DAMAGES[damage](largest(entry))
    assert_named(bmm, merged[1], entry)
    assert_mended(bmm, merged, finished[0] / "merged", MADE_BY[kind])


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", ["search", "stage-anchor"])
def test_a_damaged_manifest_is_noticed(
    kind: str, damage: str, merged: tuple[Path, Path], finished: tuple[Path, Path], bmm: Bmm
) -> None:
    entry = of_kind(merged[1], kind)[-1]
    DAMAGES[damage](entry.path / MANIFEST)
    assert_named(bmm, merged[1], entry)
    # A stage's own record is only a note of what its artefacts are: with those whole, nothing is made anew.
    assert_mended(bmm, merged, finished[0] / "merged", None if kind.startswith("stage-") else MADE_BY[kind])


@pytest.mark.parametrize("stage", STAGES)
def test_a_lost_record_of_a_stage_costs_nothing(
    stage: str, merged: tuple[Path, Path], finished: tuple[Path, Path], bmm: Bmm
) -> None:
    entry = of_kind(merged[1], f"stage-{stage}")[-1]
    flip(entry.path / "outputs.json")
    assert_named(bmm, merged[1], entry)
    assert_mended(bmm, merged, finished[0] / "merged", None)


@pytest.mark.parametrize("kind", ["predictions", "anchor"])
def test_what_only_a_finished_stage_used_is_named_and_not_missed(
    kind: str, merged: tuple[Path, Path], finished: tuple[Path, Path], bmm: Bmm
) -> None:
    pico, store = merged
    entry = of_kind(store, kind)[-1]
    if kind == "anchor":
        entry = next(item for item in of_kind(store, kind) if '"regmean"' in (item.path / MANIFEST).read_text())
    flip(largest(entry))
    assert_named(bmm, store, entry)
    states = bmm("merge", pico / "recipe.yaml", "--no-server", "--store", store, "--json").states()
    assert set(states.values()) == {"cached"}
    # The stage that needs it makes it again, to the same answers.
    evaluation = of_kind(store, "evaluation")[-1]
    numbers = (evaluation.path / "evaluation.json").read_bytes()
    shutil.rmtree(evaluation.path)
    assert_mended(bmm, merged, finished[0] / "merged", "evaluate")
    assert (evaluation.path / "evaluation.json").read_bytes() == numbers


def test_an_added_file_is_noticed(merged: tuple[Path, Path], finished: tuple[Path, Path], bmm: Bmm) -> None:
    entry = of_kind(merged[1], "model")[-1]
    (entry.path / "extra.safetensors").write_bytes(b"x")
    assert_named(bmm, merged[1], entry)
    assert_mended(bmm, merged, finished[0] / "merged", "publish")


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["model.safetensors", "merge.json", "heads/task1.safetensors"])
def test_a_damaged_output_is_written_again(
    name: str, damage: str, merged: tuple[Path, Path], finished: tuple[Path, Path], bmm: Bmm
) -> None:
    DAMAGES[damage](merged[0] / "merged" / name)
    if name == "merge.json" and damage == "delete":
        # Without its mark the folder could be anybody's.
        answer = bmm("merge", merged[0] / "recipe.yaml", "--no-server", "--store", merged[1])
        assert answer.code == 2
        assert "merge.json" in answer.err
        shutil.rmtree(merged[0] / "merged")
    assert_mended(bmm, merged, finished[0] / "merged", None)


def test_the_whole_store_lost_but_for_the_grams(
    merged: tuple[Path, Path], finished: tuple[Path, Path], bmm: Bmm
) -> None:
    for folder in (merged[1] / "artefacts").iterdir():
        if folder.name != "grams":
            shutil.rmtree(folder)
    states = bmm("merge", merged[0] / "recipe.yaml", "--no-server", "--store", merged[1], "--json").states()
    assert [stage for stage in STAGES if states[stage] == "cached"] == ["grams"]
    assert_mended(bmm, merged, finished[0] / "merged", None)
