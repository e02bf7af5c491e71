from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForSequenceClassification

from bmm.checkpoint.reader import Checkpoint, TensorInfo
from bmm.checkpoint.tensors import dtype_name, torch_dtype
from bmm.checkpoint.writer import write_weights
from bmm.errors import BMMError


def tensors_for(infos: Sequence[TensorInfo]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        info.name: torch.randint(0, 2, info.shape, generator=generator).to(torch_dtype(info.dtype)) for info in infos
    }


INFOS = st.lists(
    st.tuples(st.lists(st.integers(0, 6), max_size=3).map(tuple), st.sampled_from(["F32", "BF16", "I64", "BOOL"])),
    min_size=1,
    max_size=12,
).map(lambda parts: [TensorInfo(f"layer.{index}.weight", *part) for index, part in enumerate(parts)])


@settings(deadline=None, max_examples=25)
@given(infos=INFOS, limit=st.integers(1, 600))
def test_every_tensor_is_in_one_shard_within_the_limit(infos: list[TensorInfo], limit: int) -> None:
    tensors = tensors_for(infos)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = write_weights(folder, infos, tensors.__getitem__, limit)
        assert sorted(files) == sorted(folder.iterdir())
        shards = [file for file in files if file.suffix == ".safetensors"]
        found: dict[str, str] = {}
        for shard in shards:
            with safe_open(shard, framework="pt") as handle:
                assert handle.metadata() == {"format": "pt"}
                loaded = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
            assert not found.keys() & loaded.keys()
            found.update(dict.fromkeys(loaded, shard.name))
            assert len(loaded) == 1 or sum(tensor.nbytes for tensor in loaded.values()) <= limit
            for key, tensor in loaded.items():
                assert tensor.dtype == tensors[key].dtype
                assert torch.equal(tensor, tensors[key])
        assert found.keys() == tensors.keys()
        if len(shards) == 1:
            assert [file.name for file in files] == ["model.safetensors"]
        else:
            index = json.loads(files[-1].read_text())
            assert index["weight_map"] == found
            assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in tensors.values())}


@pytest.mark.parametrize("limit", [5000, 2**31])
def test_transformers_reads_what_is_written(save, tmp_path: Path, limit: int) -> None:
    with Checkpoint.open(save("m", dtype=torch.bfloat16, max_shard_size="9KB")) as source:
        target = tmp_path / "copy"
        target.mkdir()
        (target / "config.json").write_bytes((source.path / "config.json").read_bytes())
        files = write_weights(target, [source.info(name) for name in source.names()], source.tensor, limit)
        assert (len(files) > 1) == (limit == 5000)
        with Checkpoint.open(target) as copy:
            assert copy.names() == source.names()
        expected = AutoModelForSequenceClassification.from_pretrained(source.path).state_dict()
        loaded = AutoModelForSequenceClassification.from_pretrained(target).state_dict()
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[name], expected[name]) for name in expected)
        _, report = AutoModel.from_pretrained(target, output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["mismatched_keys"]


def test_the_same_tensors_give_the_same_bytes_and_readable_files(tmp_path: Path) -> None:
    infos = [TensorInfo(f"t{index}", (7, index), "F32") for index in range(1, 9)]
    tensors = tensors_for(infos)
    contents = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        files = write_weights(tmp_path / name, infos, lambda key: tensors[key].clone(), 400)
        contents.append({file.name: file.read_bytes() for file in files})
    assert contents[0] == contents[1]
    assert len(contents[0]) > 2
    (tmp_path / "probe").write_text("")
    rights = stat.S_IMODE((tmp_path / "probe").stat().st_mode)
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "a").iterdir()} == {rights}


@pytest.mark.parametrize("threads", [1, 3])
def test_a_tensor_is_on_its_way_to_the_disk_before_the_next_is_made(tmp_path: Path, threads: int) -> None:
    infos = [TensorInfo(f"t{index}", (2**16,), "F32") for index in range(16)]
    written: list[int] = []

    def get(name: str) -> torch.Tensor:
        written.append(sum(file.stat().st_size for file in tmp_path.iterdir()) // 2**18)
        return torch.zeros(2**16)

    write_weights(tmp_path, infos, get, 2**30, threads)
    # So many are at work at once, with one more that waits to be written.
    assert all(done >= index - (threads > 1) * (threads + 1) for index, done in enumerate(written))


@pytest.mark.parametrize("threads", [1, 2])
def test_the_bytes_are_those_of_safetensors_itself(tmp_path: Path, threads: int) -> None:
    dtypes = ("F32", "BOOL", "I64", "BF16", "U8", "F64", "F16", "I32", "I8", "I16", "U64", "U16", "U32")
    tensors = {f"{name}.{dtype}": torch.ones(3, 5).to(torch_dtype(dtype)) for dtype in dtypes for name in ("β", "a")}
    tensors |= {"none": torch.zeros(0, 4), "scalar": torch.tensor(2.5), "odd": torch.ones(3, dtype=torch.uint8)}
    infos = [TensorInfo(name, tuple(value.shape), dtype_name(value.dtype)) for name, value in tensors.items()]
    (file,) = write_weights(tmp_path, infos, tensors.__getitem__, threads=threads)
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert file.read_bytes() == (tmp_path / "theirs").read_bytes()


def test_views_and_transposes_are_written_as_they_look(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    views = {"a": whole[0], "b": whole[1], "c": whole.T, "d": whole}
    infos = [TensorInfo(name, tuple(tensor.shape), "F32") for name, tensor in views.items()]
    (file,) = write_weights(tmp_path, infos, views.__getitem__)
    with safe_open(file, framework="pt") as handle:
        assert all(torch.equal(handle.get_tensor(name), tensor) for name, tensor in views.items())


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.zeros(2, dtype=torch.float64)])
def test_a_tensor_unlike_its_announcement_is_refused(tmp_path: Path, wrong: torch.Tensor) -> None:
    with pytest.raises(BMMError, match="'a'"):
        write_weights(tmp_path, [TensorInfo("a", (2,), "F32")], lambda _: wrong)
    assert list(tmp_path.iterdir()) == []


def test_no_tensor_and_a_name_given_twice_are_refused(tmp_path: Path) -> None:
    info = TensorInfo("a", (2,), "F32")
    with pytest.raises(BMMError, match="twice"):
        write_weights(tmp_path, [info, info], lambda _: torch.zeros(2))
    with pytest.raises(BMMError, match="no tensor"):
        write_weights(tmp_path, [], lambda _: torch.zeros(2))


FULL_DISK = """
import resource, signal, sys, torch
from pathlib import Path
from bmm.checkpoint.folder import replacing
from bmm.checkpoint.reader import TensorInfo
from bmm.checkpoint.writer import write_weights
from bmm.errors import OutputError

def fill(target, sizes, length, limit):
    infos = [TensorInfo("x" * length + f".{i}", (n,), "F32") for i, n in enumerate(sizes)]
    try:
        with replacing(target) as folder:
            write_weights(folder, infos, lambda name: torch.zeros(sizes[int(name.split(".")[1])]), limit)
    except OutputError as error:
        print(error)

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
fill(Path(sys.argv[1]), [8000, 8000, 20_000], 1, 40_000)  # one shard is too large
fill(Path(sys.argv[1]), [1] * 30, 2000, 4)  # the index is
"""


def test_a_disk_that_takes_no_more_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(target)], capture_output=True, text=True, check=True)
    assert (
        done.stdout.splitlines()
        == [f"{target} cannot be written: a file would be larger than allowed; raise `ulimit -f`"] * 2
    )
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_refuses_is_one_sentence(tmp_path: Path) -> None:
    from bmm.errors import OutputError

    with pytest.raises(OutputError, match="cannot be written"):
        write_weights(tmp_path / "none", [TensorInfo("a", (2,), "F32")], lambda _: torch.zeros(2))
    assert not os.path.lexists(tmp_path / "none")
