from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from threading import Event, Timer

import pytest

from bmm.checkpoint import verified
from bmm.checkpoint.reader import Checkpoint
from bmm.checkpoint.verified import fingerprint, fingerprinting, open_verified
from bmm.errors import CheckpointError

Save = Callable[..., Path]


def digest_of(folder: Path) -> str:
    with Checkpoint.open(folder) as checkpoint:
        return fingerprint(checkpoint)


def test_the_fingerprint_is_the_digest_and_is_taken_once(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save("model")
    with Checkpoint.open(folder) as checkpoint:
        wanted = checkpoint.digest()
    taken: list[Path] = []
    digest = Checkpoint.digest

    def counted(self: Checkpoint) -> str:
        taken.append(self.path)
        return digest(self)

    monkeypatch.setattr(Checkpoint, "digest", counted)
    assert digest_of(folder) == digest_of(folder) == wanted
    assert taken == [folder]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_changed_file_is_noticed_and_named(save: Save, name: str) -> None:
    folder = save("model")
    digest = digest_of(folder)
    with open_verified(folder, digest) as checkpoint:
        assert checkpoint.path == folder
    file = folder / name
    content = bytearray(file.read_bytes())
    content[-2] = ord(" ")
    file.write_bytes(content)
    if name == "config.json":
        file.write_bytes(bytes(content[:-2]) + b" }")
    with pytest.raises(CheckpointError, match=f"{folder} was changed while the merge was running"):
        open_verified(folder, digest)


def test_a_replaced_model_of_the_same_size_is_noticed(save: Save) -> None:
    folder, other = save("model", seed=0), save("other", seed=1)
    digest = digest_of(folder)
    assert (folder / "model.safetensors").stat().st_size == (other / "model.safetensors").stat().st_size
    (other / "model.safetensors").replace(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="was changed while"):
        open_verified(folder, digest)


def test_an_added_tokenizer_counts_and_a_card_does_not(save: Save) -> None:
    folder = save("model")
    digest = digest_of(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    open_verified(folder, digest).close()
    (folder / "vocab.txt").write_text("a\n")
    with pytest.raises(CheckpointError):
        open_verified(folder, digest)


def test_fingerprints_taken_ahead_are_those_of_each_alone(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [save(f"model{seed}", seed=seed) for seed in range(3)]
    wanted = [Checkpoint.open(folder).digest() for folder in folders]
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(verified, "_WORTH_THREADS", 0)
    with fingerprinting([*folders, tmp_path / "empty", tmp_path / "missing"]) as size:
        assert size == sum(file.stat().st_size for folder in folders for file in Checkpoint.open(folder).files)
    monkeypatch.setattr(Checkpoint, "digest", None)
    assert [digest_of(folder) for folder in folders] == wanted


def test_what_is_small_is_not_taken_ahead(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save("model")
    monkeypatch.setattr(Checkpoint, "digest", None)
    with fingerprinting([folder]) as size:
        assert size == 0


def test_a_block_that_fails_does_not_wait_for_all_fingerprints(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [save(f"model{number}") for number in range(8)]
    monkeypatch.setattr(verified, "_WORTH_THREADS", 0)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    begun, go_on = Event(), Event()
    taken: list[Path] = []

    def slow(self: Checkpoint) -> str:
        taken.append(self.path)
        begun.set()
        assert go_on.wait(60)
        return "digest"

    def interrupted() -> None:
        with fingerprinting(folders):
            assert begun.wait(60)
            Timer(0.2, go_on.set).start()
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "digest", slow)
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert taken == folders[:1]
