"""Writing weights as safetensors, in shards as transformers reads them, with one tensor at a time in memory.

Tensors come one by one from a function, so neither a merged model nor a shard need ever exist as a whole. The same
tensors give the same bytes. Config, tokenizer and heads are written elsewhere; `bmm.checkpoint.folder` makes the folder
appear as a whole.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bmm.checkpoint.folder import output_error
from bmm.checkpoint.shards import INDEX
from bmm.checkpoint.tensors import TensorInfo, torch_dtype
from bmm.errors import BMMError
from bmm.threads import ahead

if TYPE_CHECKING:
    from torch import Tensor

MAX_SHARD_BYTES = 2 * 2**30
# What safetensors itself does: tensors stand by dtype, in the reverse of this order, and then by name.
_RANKS = ("BOOL", "U8", "I8", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "F64", "I64", "U64")
_ALIGNMENT = 8


def write_weights(
    folder: Path,
    infos: Sequence[TensorInfo],
    get: Callable[[str], Tensor],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    threads: int = 1,
) -> list[Path]:
    """Write tensors as `model.safetensors`, or as numbered shards with `model.safetensors.index.json`.

    Shards are filled in the order of `infos`; a tensor larger than `max_shard_bytes` gets a shard of its own.
    Every file is synced to disk.

    Args:
        folder: an existing folder; whether it may be written to is its owner's question.
        infos: name, shape and dtype of every tensor.
        get: returns a tensor by name, asked once for each; its shape and dtype must be as announced.
        max_shard_bytes: most bytes of tensors in one file.
        threads: threads that call `get`, which must bear it; more than one hold as many tensors in memory, and one.

    Returns:
        The files written, the index (where there is one) last.

    Raises:
        OutputError: the disk is full, read-only or refuses.
        BMMError: a name comes twice, or `get` returns another shape or dtype than announced.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    by_name = {info.name: info for info in infos}
    if len(by_name) != len(infos):
        raise BMMError(f"a tensor is to be written twice into {folder}")
    if not by_name:
        raise BMMError(f"no tensor is to be written into {folder}")
    split = split_state_dict_into_shards_factory(
        by_name,
        get_storage_size=lambda info: info.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    written = []
    for file_name, names in split.filename_to_tensors.items():
        written.append(folder / file_name)
        _write_shard(written[-1], [by_name[name] for name in names], get, threads)
    if split.is_sharded:
        written.append(folder / INDEX)
        index = {
            "metadata": {"total_size": sum(info.nbytes for info in infos)},
            "weight_map": split.tensor_to_filename,
        }
        _write_text(written[-1], json.dumps(index, indent=2, sort_keys=True) + "\n")
    return written


def _write_shard(file: Path, infos: Sequence[TensorInfo], get: Callable[[str], Tensor], threads: int) -> None:
    """Write one file, to the same bytes as `safetensors.torch.save_file`, but a tensor at a time."""
    ordered = sorted(infos, key=lambda info: (-_RANKS.index(info.dtype), info.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for info in ordered:
        header[info.name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [start, start := start + info.nbytes],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    try:
        with _naming(file), file.open("wb") as handle:
            handle.write(len(text).to_bytes(8, "little"))
            handle.write(text)
            for info, tensor in zip(ordered, ahead(lambda info: get(info.name), ordered, threads), strict=True):
                handle.write(_bytes_of(info, tensor))
            handle.flush()
            os.fsync(handle.fileno())
    except BaseException:
        file.unlink(missing_ok=True)
        raise


def _bytes_of(info: TensorInfo, tensor: Tensor) -> Any:
    """Return a tensor's bytes, little end first, as safetensors stores them."""
    import torch

    if tuple(tensor.shape) != info.shape or tensor.dtype != torch_dtype(info.dtype):
        raise BMMError(
            f"the tensor '{info.name}' was announced as {info.dtype} {info.shape} "
            f"and came as {tensor.dtype} {tuple(tensor.shape)}"
        )
    if sys.byteorder != "little":
        raise BMMError("safetensors are written on little-endian machines only")
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _write_text(file: Path, text: str) -> None:
    with _naming(file), file.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Turn the operating system's refusals into one sentence, their cause naming the file as well."""
    try:
        yield
    except OSError as error:
        raise output_error(error, file) from OSError(error.errno, error.strerror, str(file))
