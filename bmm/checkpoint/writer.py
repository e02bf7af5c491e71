"""Writing weights as safetensors, in shards as transformers reads them, with at most one shard in memory.

Tensors come one by one from a function, so a merged model need never exist as a whole. The same tensors give
the same bytes. Config, tokenizer and heads are written elsewhere; `bmm.checkpoint.folder` makes the folder
appear as a whole.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from bmm.checkpoint.folder import output_error
from bmm.checkpoint.shards import INDEX
from bmm.checkpoint.tensors import TensorInfo, torch_dtype
from bmm.errors import BMMError

if TYPE_CHECKING:
    from torch import Tensor

MAX_SHARD_BYTES = 2 * 2**30
_ERRNO = re.compile(r"\(os error (\d+)\)")


def write_weights(
    folder: Path,
    infos: Sequence[TensorInfo],
    get: Callable[[str], Tensor],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[Path]:
    """Write tensors as `model.safetensors`, or as numbered shards with `model.safetensors.index.json`.

    Shards are filled in the order of `infos`; a tensor larger than `max_shard_bytes` gets a shard of its own.
    Every file is synced to disk.

    Args:
        folder: an existing folder; whether it may be written to is its owner's question.
        infos: name, shape and dtype of every tensor.
        get: returns a tensor by name, asked once for each; its shape and dtype must be as announced.
        max_shard_bytes: most bytes of tensors in one file.

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
        _write_shard(written[-1], [by_name[name] for name in names], get)
    if split.is_sharded:
        written.append(folder / INDEX)
        index = {
            "metadata": {"total_size": sum(info.nbytes for info in infos)},
            "weight_map": split.tensor_to_filename,
        }
        _write_text(written[-1], json.dumps(index, indent=2, sort_keys=True) + "\n")
    return written


def _write_shard(file: Path, infos: Sequence[TensorInfo], get: Callable[[str], Tensor]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # safetensors refuses tensors that share memory, as slices of one computed matrix do: those are copied.
    tensors: dict[str, Tensor] = {}
    stores: set[int] = set()
    for info in infos:
        tensor = get(info.name).detach().cpu().contiguous()
        if tuple(tensor.shape) != info.shape or tensor.dtype != torch_dtype(info.dtype):
            raise BMMError(
                f"the tensor '{info.name}' was announced as {info.dtype} {info.shape} "
                f"and came as {tensor.dtype} {tuple(tensor.shape)}"
            )
        if tensor.untyped_storage().data_ptr() in stores:
            tensor = tensor.clone()
        stores.add(tensor.untyped_storage().data_ptr())
        tensors[info.name] = tensor
    with _naming(file):
        try:
            save_file(tensors, file, metadata={"format": "pt"})
        except SafetensorError as error:
            found = _ERRNO.search(str(error))
            if found is None:
                raise
            raise OSError(int(found[1]), os.strerror(int(found[1]))) from error
        # safetensors writes through a private temporary file, whose rights would hide the model from
        # colleagues.
        file.chmod(0o666 & ~_umask())
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


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


def _umask() -> int:
    """Return the process's umask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
