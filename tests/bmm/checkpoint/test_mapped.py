from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file

from bmm.checkpoint.mapped import MappedFile, mapped


def _mapped_bytes(file: Path) -> int:
    """Return how much of a file this process has in memory."""
    return sum(region.rss for region in psutil.Process().memory_maps() if region.path == str(file))


def test_a_file_read_from_end_to_end_does_not_stay_in_memory(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    stored = {f"t{index}": torch.full((2**18,), float(index)) for index in range(16)}
    save_file(stored, file)
    reader = MappedFile(file, most_bytes=2 * 2**20)
    largest = 0
    for name, tensor in stored.items():
        assert torch.equal(reader.tensor(name), tensor)
        largest = max(largest, _mapped_bytes(file))
    assert 0 < largest <= 5 * 2**20 < file.stat().st_size


def test_a_tensor_outlives_the_opening_that_it_came_from(tmp_path: Path) -> None:
    stored = {f"t{index}": torch.full((1000,), float(index)) for index in range(4)}
    save_file(stored, tmp_path / "weights.safetensors")
    reader = MappedFile(tmp_path / "weights.safetensors", most_bytes=0)
    read = {name: reader.tensor(name) for name in stored}
    assert all(torch.equal(read[name], tensor) for name, tensor in stored.items())


def test_a_file_that_is_replaced_meanwhile_is_not_believed(tmp_path: Path) -> None:
    file, other = tmp_path / "weights.safetensors", tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(3), "b": torch.zeros(3)}, file)
    reader = MappedFile(file, most_bytes=0)
    reader.tensor("a")
    save_file({"a": torch.ones(3), "b": torch.ones(3)}, other)
    other.replace(file)
    with pytest.raises(OSError, match="replaced while it was in use"):
        reader.tensor("b")


def test_tensors_are_found_in_the_last_file_that_has_them(tmp_path: Path) -> None:
    for index, names in enumerate((("a", "b"), ("b", "c"))):
        save_file({name: torch.tensor([float(index)]) for name in names}, tmp_path / f"{index}.safetensors")
    found = mapped(sorted(tmp_path.glob("*.safetensors")))
    assert {name: file.tensor(name).item() for name, file in found.items()} == {"a": 0.0, "b": 1.0, "c": 1.0}


def test_many_files_read_in_turn_do_not_stay_in_memory_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bmm.checkpoint.mapped.MOST_BYTES", 2 * 2**20)
    for index in range(12):
        save_file({f"t{index}": torch.full((2**18,), float(index))}, tmp_path / f"{index:02}.safetensors")
    found = mapped(sorted(tmp_path.glob("*.safetensors")))
    for _ in range(2):
        for name, file in found.items():
            assert file.tensor(name)[-1].item() == float(name[1:])
        # Looking at all maps of a process takes a while.
        assert sum(region.rss for region in psutil.Process().memory_maps() if str(tmp_path) in region.path) <= 4 * 2**20


def test_a_file_can_be_let_go_of_and_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_file({"a": torch.ones(2**18), "b": torch.zeros(3)}, file)
    reader = MappedFile(file)
    assert bool(reader.tensor("a").all())
    assert _mapped_bytes(file) > 2**19
    reader.rest()
    assert _mapped_bytes(file) == 0
    assert not bool(reader.tensor("b").any())
    reader.rest()
    save_file({"b": torch.ones(3)}, file)
    with pytest.raises(OSError, match="replaced"):
        reader.tensor("b")
