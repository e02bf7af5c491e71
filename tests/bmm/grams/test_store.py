from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bmm.errors import ArtefactDamagedError
from bmm.grams import store as gram_store
from bmm.grams.collect import GramSum
from bmm.grams.store import GramReader, write


def sums(*sizes: int, rows: int = 7) -> dict[str, GramSum]:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for size in sizes:
        inputs = torch.randn(rows, size, generator=generator, dtype=torch.float64)
        found[f"encoder.layer.{size}.dense"] = GramSum(inputs.T @ inputs, rows)
    return found


def chunks(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file() and file.name != "zarr.json")


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.integers(1, 40),
    rows=st.integers(1, 1000),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([1e-30, 1, 1e30]),
)
def test_a_sum_comes_back_bit_for_bit_over_its_rows(
    tmp_path_factory: pytest.TempPathFactory, size: int, rows: int, seed: int, scale: float
) -> None:
    path = tmp_path_factory.mktemp("grams") / "grams.zarr"
    total = torch.from_numpy(np.random.default_rng(seed).standard_normal((size, size)) * scale)
    write(path, [("a.dense", GramSum(total, rows))], {})
    reader = GramReader(path)
    assert reader.rows("a.dense") == rows
    gram = reader.gram("a.dense")
    assert gram.dtype == torch.float64
    assert gram.numpy().tobytes() == (total / rows).numpy().tobytes()


def test_names_rows_and_provenance_are_kept(tmp_path: Path) -> None:
    provenance = {"expert": "abc", "shards": ["one", "two"], "shard_rows": 24}
    write(tmp_path / "grams.zarr", sums(4, 6).items(), provenance)
    reader = GramReader(tmp_path / "grams.zarr")
    assert reader.names() == ["encoder.layer.4.dense", "encoder.layer.6.dense"]
    assert reader.provenance == provenance


def test_the_same_sums_give_the_same_bytes(tmp_path: Path) -> None:
    trees = []
    for name in ("one", "two"):
        path = tmp_path / name
        parts = sums(4, 6)
        write(path, reversed(parts.items()) if name == "two" else parts.items(), {"expert": "abc"})
        trees.append({file.relative_to(path): file.read_bytes() for file in path.rglob("*") if file.is_file()})
    assert trees[0] == trees[1]


def test_a_lost_chunk_is_not_taken_for_zeros(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram_store, "_LARGEST_CHUNK", 4)
    path = tmp_path / "grams.zarr"
    write(path, sums(8).items(), {})
    files = chunks(path)
    assert len(files) == 4
    files[2].unlink()
    with pytest.raises(ArtefactDamagedError, match=r"encoder\.layer\.8\.dense.*lost a chunk"):
        GramReader(path).gram("encoder.layer.8.dense")


@pytest.mark.parametrize("cut", [False, True])
def test_a_damaged_chunk_is_noticed(tmp_path: Path, cut: bool) -> None:
    path = tmp_path / "grams.zarr"
    write(path, sums(8).items(), {})
    (file,) = chunks(path)
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content[:-9] if cut else content)
    with pytest.raises(ArtefactDamagedError, match=r"encoder\.layer\.8\.dense"):
        GramReader(path).gram("encoder.layer.8.dense")


@given(st.integers(1, 9000))
def test_chunks_divide_the_matrix_where_they_can_and_are_never_large(size: int) -> None:
    chunk = gram_store._chunk(size)
    assert 1 <= chunk <= 1024
    assert size % chunk == 0 or chunk == 1024
    assert chunk == size or chunk >= 256


def test_a_matrix_of_several_chunks_comes_back_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram_store, "_LARGEST_CHUNK", 5)
    parts = sums(7, 10, rows=1)
    write(tmp_path / "grams.zarr", parts.items(), {})
    reader = GramReader(tmp_path / "grams.zarr")
    for name, part in parts.items():
        assert torch.equal(reader.gram(name), part.total)
