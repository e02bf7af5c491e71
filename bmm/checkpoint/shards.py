"""Finding a model folder's weight files and reading their headers, without torch and without a tensor.

Only safetensors is read, as `model.safetensors` or as shards listed in `model.safetensors.index.json` (where
both are there the single file counts, as in transformers). What the shards' own headers say counts; the index
must agree.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from bmm.checkpoint.allowed import check_allowed
from bmm.checkpoint.tensors import TensorInfo, is_supported
from bmm.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_WRAPPERS = {"module.": "DataParallel", "_orig_mod.": "torch.compile"}
_LEGACY = re.compile(r"(?P<layer>(^|\.)LayerNorm)\.(?P<old>gamma|beta)$")
_MODERN = {"gamma": "weight", "beta": "bias"}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor: what it is, the file that holds it, and the key it has in there."""

    info: TensorInfo
    file: Path
    key: str


@dataclass(frozen=True, slots=True)
class Weights:
    """All weight files of a folder, its index where it has one, and every tensor by its modern name."""

    files: tuple[Path, ...]
    index: Path | None
    tensors: dict[str, StoredTensor]


def find_weights(folder: Path) -> Weights:
    """Read the headers of all weight files in `folder`.

    Raises:
        CheckpointError: no safetensors weights, an index and shards that disagree, a damaged file.
        UserError: a file lies, behind a symbolic link, outside of the allowed folders.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file():
        files, listed, used_index = [single], dict[str, str](), None
    elif index.is_file():
        check_allowed(index, "the weights")
        listed = _read_index(index)
        files, used_index = [folder / name for name in sorted(set(listed.values()))], index
    else:
        raise _no_weights(folder)
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        check_allowed(file, "the weights")
        for stored in read_header(file):
            name = stored.info.name
            if name in tensors:
                raise CheckpointError(_twice(name, tensors[name], stored))
            tensors[name] = stored
    for key, shard in listed.items():
        found = tensors.get(modern_name(key))
        if found is None or found.file != folder / shard:
            raise CheckpointError(
                f"{index} says that the tensor '{key}' is in {shard}, which lacks it; save or download the model again"
            )
    for wrapper, by in _WRAPPERS.items():
        if tensors and all(name.startswith(wrapper) for name in tensors):
            raise CheckpointError(
                f"{files[0]} was saved from inside of {by}: its names begin with '{wrapper}', under which transformers "
                f"finds nothing; save it again with `save_pretrained` of the model inside"
            )
    if not tensors:
        raise CheckpointError(f"{files[0]} holds no tensor; save or download the model again")
    return Weights(tuple(files), used_index, tensors)


def modern_name(key: str) -> str:
    """Return the name transformers uses today for a stored key (`LayerNorm.gamma` -> `LayerNorm.weight`)."""
    return _LEGACY.sub(lambda match: f"{match['layer']}.{_MODERN[match['old']]}", key)


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        CheckpointError: the file cannot be read, is not JSON, or holds something else than an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; check its permissions") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); save or download the model again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object; save or download the model again")
    return value


def _read_index(index: Path) -> dict[str, str]:
    """Return the index's map from key to shard name, every shard checked to be a file inside the folder."""
    listed = read_json_object(index).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise CheckpointError(f"{index} has no 'weight_map' from tensors to shards; save or download the model again")
    for key, name in listed.items():
        parts = PurePosixPath(name.replace("\\", "/"))
        if parts.is_absolute() or ".." in parts.parts or ":" in name:
            raise CheckpointError(
                f"{index} names '{name}' for the tensor '{key}', a file outside of the model's folder; "
                "only shards beside the index are read"
            )
        if not (index.parent / name).is_file():
            raise CheckpointError(
                f"{index} names the shard '{name}' for the tensor '{key}', but there is no such file; "
                "copy or download it into the folder"
            )
    return listed


def read_header(file: Path) -> list[StoredTensor]:
    """Return what a safetensors file holds, in no certain order.

    Raises:
        CheckpointError: the file is damaged, cannot be read, or holds numbers that cannot be merged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as handle:
            slices = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118 - not a mapping
            found = [(key, tuple(part.get_shape()), str(part.get_dtype())) for key, part in slices.items()]
    except PermissionError:
        raise CheckpointError(f"{file} cannot be read: permission denied; check its permissions") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{file} is not a whole safetensors file ({' '.join(str(error).split())}); copy or download it again"
        ) from None
    for key, _, dtype in found:
        if not is_supported(dtype):
            raise CheckpointError(
                f"{file}: the tensor '{key}' is stored as {dtype}, which cannot be merged; "
                "save the model as F32 or BF16"
            )
    return [StoredTensor(TensorInfo(modern_name(key), shape, dtype), file, key) for key, shape, dtype in found]


def _twice(name: str, first: StoredTensor, second: StoredTensor) -> str:
    if first.file != second.file:
        where = f"both {first.file} and {second.file.name}"
    else:
        where = f"{first.file} as both '{first.key}' and '{second.key}'"
    return f"the tensor '{name}' is stored twice, in {where}; save or download the model again"


def _no_weights(folder: Path) -> CheckpointError:
    """Say what the folder has instead of safetensors weights."""
    pickles = sorted(file for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        return CheckpointError(
            f"{pickles[0]} is a pickle, which is never loaded; convert it to safetensors with "
            "`from_pretrained(...).save_pretrained(...)` on a machine where you trust it"
        )
    if any(folder.glob("model-*-of-*.safetensors")):
        return CheckpointError(f"{folder} has shards but no {INDEX}; copy or download the index too")
    return CheckpointError(
        f"{folder} holds no weights: there is neither {SINGLE} nor {INDEX}; save the model there with `save_pretrained`"
    )
