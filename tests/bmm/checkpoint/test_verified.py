from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from bmm.checkpoint.reader import Checkpoint
from bmm.checkpoint.verified import fingerprint, open_verified
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
