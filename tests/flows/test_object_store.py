"""Whole commands with a store on an object store: the same bytes as with a folder, and one sentence where it fails."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from answers import Answer
from object_server import KEY_ID, SECRET, ObjectServer
from store_benches import ObjectBench

from bmm.stores import objects

Command = Callable[..., Answer]
Files = Callable[[Path], dict[str, bytes]]


@pytest.fixture
def bench(object_server: ObjectServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ObjectBench:
    """An empty store, on a machine without copies; the environment names the server."""
    for name, value in object_server.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return ObjectBench(object_server)


def folder_of(finished: tuple[Path, Path, Any], tmp_path: Path) -> Path:
    """A copy of the finished merge's folder without its output."""
    shutil.copytree(finished[0], tmp_path / "pico", ignore=shutil.ignore_patterns("merged"))
    return tmp_path / "pico"


@pytest.mark.slow
def test_a_merge_gives_the_same_bytes_as_with_a_folder_and_is_cached_by_the_bucket_alone(
    finished: tuple[Path, Path, Any],
    bench: ObjectBench,
    tmp_path: Path,
    bmm_here: Command,
    edit_recipe: Callable[..., Path],
    model_files: Files,
    on_server: object,
) -> None:
    # Workers of its own, which know the server from their environment and the store from their requests.
    recipe = edit_recipe(
        folder_of(finished, tmp_path), cluster={"workers": 2, "memory_limit": "4GiB"}, tracking={"enabled": False}
    )
    words = (recipe, "--store", bench.location, "--json")
    planned = bmm_here("plan", *words).document
    assert (planned["store"], planned["free"]["store"]) == (bench.location, None)
    assert planned["free"]["work"] > 0
    assert "room is unknown" in " ".join(bmm_here("plan", recipe, "--store", bench.location).out.split())

    first = bmm_here("merge", *words, "--no-server")
    assert set(first.states().values()) == {"ran"}
    assert first.document["store"] == bench.location
    made = model_files(recipe.parent / "merged")
    assert made == model_files(finished[0] / "merged")
    assert "walk-group" not in " ".join(bench.listed())
    assert not [key for key in bench.listed() if key.startswith("leases/")]

    assert set(bmm_here("merge", *words, "--no-server").states().values()) == {"cached"}
    # Another machine, and through Prefect.
    bench.forget_copies()
    shutil.rmtree(recipe.parent / "merged")
    third = bmm_here("merge", *words)
    assert set(third.states().values()) == {"cached"}
    assert model_files(recipe.parent / "merged") == made
    assert bmm_here("plan", *words).document["disk_bytes"] == 0

    listed = bmm_here("store", "ls", "--store", bench.location, "--json").document
    assert {entry["kind"] for entry in listed["artefacts"]} > {"anchor", "search", "walk", "model", "stage-publish"}
    checked = bmm_here("store", "verify", "--store", bench.location, "--json")
    assert (checked.code, checked.document["checked"]) == (0, len(listed["artefacts"]))

    said = [first.out, first.err, third.out, third.err]
    kept = [path for folder in (tmp_path / "cache", recipe.parent / "merged") for path in folder.rglob("*")]
    for text in [*(one.encode() for one in said), *(path.read_bytes() for path in kept if path.is_file())]:
        assert SECRET.encode() not in text
        assert KEY_ID.encode() not in text

    pruned = bmm_here("store", "prune", "--older-than", "0", "--copies", "--store", bench.location, "--json").document
    assert pruned["artefacts"] == 0
    assert pruned["copies"] > 0
    assert bmm_here("store", "ls", "--store", bench.location, "--json").document == listed
    gone = bmm_here("store", "prune", "--older-than", "0", "--store", bench.location, "--json").document
    assert gone["artefacts"] == len(listed["artefacts"])
    assert bench.listed() == []


@pytest.mark.slow
def test_grams_go_through_the_bucket(
    pico: Path, bench: ObjectBench, bmm_here: Command, edit_recipe: Callable[..., Path]
) -> None:
    recipe = edit_recipe(pico, cluster={"workers": 1}, regression={"mode": "module-wise"})
    words = ("grams", recipe, "--store", bench.location, "--json")
    first = bmm_here(*words).document
    assert first["state"] == "ran"
    bench.forget_copies()
    again = bmm_here(*words, "--output", pico / "published").document
    assert again["state"] == "cached"
    assert [entry["digest"] for entry in again["experts"]] == [entry["digest"] for entry in first["experts"]]
    assert (pico / "published" / "task0" / "grams.zarr").is_dir()
    kinds = {key.split("/")[1] for key in bench.listed() if key.startswith("artefacts/")}
    assert "grams" in kinds
    assert "gram-shard" not in kinds


@pytest.mark.parametrize(
    ("changes", "location", "said"),
    [
        ({}, "s3://no-such-bucket/x", "there is no bucket no-such-bucket at http://127.0.0.1:"),
        ({"AWS_ACCESS_KEY_ID": ""}, "s3://bucket/x", "needs credentials: set AWS_ACCESS_KEY_ID"),
        ({"AWS_ENDPOINT_URL": "nobody"}, "s3://bucket/x", "has not answered for"),
        ({"AWS_ENDPOINT_URL": "127.0.0.1:9000"}, "s3://bucket/x", "is not an address like https://host:port"),
        ({}, f"s3://{KEY_ID}:{SECRET}@bucket/x", "credentials belong in AWS_ACCESS_KEY_ID"),
        ({}, "gs://bucket/x", "neither a folder nor an s3://bucket/prefix"),
    ],
)
def test_a_store_that_cannot_be_used_is_one_sentence(
    changes: dict[str, str],
    location: str,
    said: str,
    bench: ObjectBench,
    pico: Path,
    bmm_here: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(objects, "HASTE_SECONDS", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        for name, value in changes.items():
            url = f"http://127.0.0.1:{silent.getsockname()[1]}"
            monkeypatch.setenv(name, url if value == "nobody" else value)
        answers = [
            bmm_here("merge", pico / "recipe.yaml", "--no-server", "--store", location),
            bmm_here("plan", pico / "recipe.yaml", "--store", location),
            bmm_here("store", "ls", "--store", location),
        ]
    for answer in answers:
        assert answer.code == 2, answer
        assert answer.out == ""
        (sentence,) = answer.complaints
        assert said in sentence
        assert SECRET not in sentence
        assert KEY_ID not in sentence
    assert not (pico / "merged").exists()
