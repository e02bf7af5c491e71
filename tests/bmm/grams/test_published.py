from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bmm.digest import digest_file, digest_json
from bmm.errors import OutputError, RecipeError, UserError
from bmm.grams.collect import GramSum
from bmm.grams.published import copy, find, publish
from bmm.grams.store import GramReader, write
from bmm.store import Artefact, Draft, Store, artefact_key
from bmm.stores.manifest import MANIFEST

WHERE = "the Gram matrices of one"


def made(store: Path, kind: str = "grams", scale: float = 1.0) -> Artefact:
    def make(draft: Draft) -> None:
        write(
            draft.path / "grams.zarr", [("a", GramSum(scale * torch.eye(3, dtype=torch.float64), 2))], {"expert": "x"}
        )

    opened = Store.open(store)
    reference, _ = opened.obtain(kind, artefact_key(kind, 1, {"scale": scale}, {}), make)
    return opened.read(reference)


def resealed(folder: Path, **changes: Any) -> None:
    """Change a manifest as somebody would who knows how it is sealed."""
    path = folder / MANIFEST
    value = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    files = {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": digest_file(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file != path
    }
    value |= {"files": files, "digest": changes.get("digest", digest_json(files))}
    value["seal"] = digest_json({name: part for name, part in value.items() if name != "seal"})
    path.write_text(json.dumps(value, indent=1, sort_keys=True), encoding="utf-8")


def test_what_is_published_is_found_and_copied_byte_for_byte(tmp_path: Path) -> None:
    artefact = made(tmp_path / "store")
    folder = tmp_path / "out" / "one"
    publish(artefact, folder)
    publish(artefact, folder)
    assert [path.name for path in folder.parent.iterdir()] == ["one"]
    found = find(folder, WHERE)
    assert found.digest == artefact.reference.digest
    copy(found, tmp_path / "copy", WHERE)
    for name in artefact.manifest["files"]:
        assert (tmp_path / "copy" / name).read_bytes() == artefact.file(name).read_bytes()
    assert torch.equal(GramReader(tmp_path / "copy" / "grams.zarr").sum("a").total, torch.eye(3, dtype=torch.float64))


def test_an_artefact_in_a_store_is_a_published_folder_too(tmp_path: Path) -> None:
    artefact = made(tmp_path / "store")
    assert find(artefact.path, WHERE).digest == artefact.reference.digest


def test_somebody_elses_folder_is_not_written_over(tmp_path: Path) -> None:
    artefact = made(tmp_path / "store")
    folder = tmp_path / "one"
    folder.mkdir()
    (folder / "note.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match="one holds something else already"):
        publish(artefact, folder)
    publish(artefact, tmp_path / "other")
    with pytest.raises(OutputError, match="other holds something else already"):
        publish(made(tmp_path / "store", scale=2.0), tmp_path / "other")
    for place in (folder / "note.txt", folder / "note.txt" / "one"):
        with pytest.raises(OutputError, match=r"note\.txt is a file"):
            publish(artefact, place)


def test_a_folder_outside_of_the_allowed_ones_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artefact = made(tmp_path / "store")
    monkeypatch.setenv("BMM_ALLOWED_FOLDERS", str(tmp_path / "store"))
    with pytest.raises(UserError, match="the folder for the Gram matrices"):
        publish(artefact, tmp_path / "one")
    assert find(artefact.path, WHERE)
    with pytest.raises(UserError, match=WHERE):
        find(tmp_path, WHERE)


def test_what_is_no_published_folder_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"of one: there is no folder .*nowhere; name one that `bmm grams"):
        find(tmp_path / "nowhere", WHERE)
    with pytest.raises(RecipeError, match=r"of one: .* holds no manifest\.json"):
        find(tmp_path, WHERE)
    with pytest.raises(RecipeError, match="an artefact of kind 'anchor', not Gram matrices"):
        find(made(tmp_path / "store", kind="anchor").path, WHERE)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda folder: (folder / MANIFEST).write_text("{}", encoding="utf-8"), "unreadable manifest"),
        (
            lambda folder: (folder / "grams.zarr/a/c/0/0").unlink(),
            "lacks, or has too much, the file grams.zarr/a/c/0/0",
        ),
        (lambda folder: (folder / "grams.zarr/b").write_text("", encoding="utf-8"), "the file grams.zarr/b"),
        (lambda folder: resealed(folder, digest="0" * 64), "altered manifest"),
    ],
)
def test_a_folder_that_lost_or_gained_something_is_refused(tmp_path: Path, harm: Any, said: str) -> None:
    publish(made(tmp_path / "store"), tmp_path / "one")
    harm(tmp_path / "one")
    with pytest.raises(RecipeError, match=f"of one: .*{said}.*; publish it again"):
        find(tmp_path / "one", WHERE)


def test_a_changed_byte_is_noticed_when_it_is_copied(tmp_path: Path) -> None:
    publish(made(tmp_path / "store"), tmp_path / "one")
    found = find(tmp_path / "one", WHERE)
    chunk = tmp_path / "one" / "grams.zarr/a/c/0/0"
    content = bytearray(chunk.read_bytes())
    content[3] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(RecipeError, match=r"of one: .*c/0/0 is damaged; copy the folder again"):
        copy(found, tmp_path / "copy", WHERE)


def test_a_folder_replaced_since_it_was_found_is_refused(tmp_path: Path) -> None:
    publish(made(tmp_path / "store"), tmp_path / "one")
    found = find(tmp_path / "one", WHERE)
    resealed(tmp_path / "one")
    (tmp_path / "one" / "grams.zarr/a/c/0/0").write_bytes(b"x" * 76)
    resealed(tmp_path / "one")
    with pytest.raises(RecipeError, match="has been replaced while it was in use"):
        copy(found, tmp_path / "copy", WHERE)


def edit(name: str, **changes: Any) -> Any:
    def apply(folder: Path) -> None:
        path = folder / "grams.zarr" / name
        path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")

    return apply


def rename_to_version_2(folder: Path) -> None:
    (folder / "grams.zarr" / "a" / "zarr.json").rename(folder / "grams.zarr" / "a" / ".zarray")


@pytest.mark.parametrize(
    "harm",
    [
        edit("a/zarr.json", codecs=[{"name": "bytes"}, {"name": "numcodecs.pickle"}]),
        edit("a/zarr.json", data_type="object"),
        edit("a/zarr.json", storage_transformers=[{"name": "odd"}]),
        edit("a/zarr.json", shape=[3, 4]),
        edit("a/zarr.json", attributes={}),
        edit("a/zarr.json", attributes={"rows": "many"}),
        edit("zarr.json", consolidated_metadata={"metadata": {}}),
        edit("zarr.json", zarr_format=2),
        rename_to_version_2,
    ],
)
def test_zarr_that_we_would_not_have_written_is_never_opened(tmp_path: Path, harm: Any) -> None:
    publish(made(tmp_path / "store"), tmp_path / "one")
    harm(tmp_path / "one")
    resealed(tmp_path / "one")
    with pytest.raises(RecipeError, match="is not what `bmm grams` writes"):
        copy(find(tmp_path / "one", WHERE), tmp_path / "copy", WHERE)


def test_a_file_that_has_nothing_to_do_there_is_refused(tmp_path: Path) -> None:
    publish(made(tmp_path / "store"), tmp_path / "one")
    (tmp_path / "one" / "run.py").write_text("", encoding="utf-8")
    resealed(tmp_path / "one")
    with pytest.raises(RecipeError, match=r"the file run\.py, which is no part of Gram matrices"):
        copy(find(tmp_path / "one", WHERE), tmp_path / "copy", WHERE)
