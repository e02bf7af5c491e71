"""Reading a Hugging Face model folder lazily: names, shapes, dtypes and digests at once, tensors one by one.

Opening touches `config.json` and the headers of the weight files, so cache keys cost nothing. Tensors that transformers
joins or cuts on loading are given as the loaded model has them (`bmm.checkpoint.conversion`). Whether checkpoints fit
together is `bmm.checkpoint.comparison`'s question.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from threading import RLock
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import yaml

from bmm.checkpoint.allowed import check_allowed
from bmm.checkpoint.conversion import Conversion, rules_of
from bmm.checkpoint.lora import ADAPTER_CONFIG
from bmm.checkpoint.mapped import MappedFile
from bmm.checkpoint.shards import INDEX, SINGLE, StoredTensor, Weights, find_weights, read_json_object
from bmm.checkpoint.tensors import TensorInfo
from bmm.digest import digest_files
from bmm.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Checkpoint", "TensorInfo"]

CONFIG = "config.json"
_converting = RLock()
_SUPPORT = (
    CONFIG,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "*.model",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template*",
)


class Checkpoint:
    """One model folder, opened for reading; a context manager that lets go of its files at the end.

    Attributes:
        path: the folder.
        weight_files: the safetensors files, sorted by name.
        support_files: config, tokenizer and processor files which are there, sorted by name.
    """

    def __init__(self, path: Path, config: dict[str, Any], weights: Weights, support_files: tuple[Path, ...]) -> None:
        self.path = path
        self._config = config
        self.weight_files = weights.files
        self.support_files = support_files
        self._weights = weights
        self._handles: dict[Path, MappedFile] = {}
        self._last: tuple[Conversion, dict[str, Tensor]] | None = None

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a model folder without loading a tensor.

        Raises:
            CheckpointError: the folder is missing, damaged, pickled, a PEFT adapter, or needs its own code.
            UserError: the folder or one of its files lies outside of `BMM_ALLOWED_FOLDERS`.
        """
        path = Path(path)
        check_allowed(path, "the model")
        try:
            if not path.exists():
                raise CheckpointError(f"there is no model folder at {path}; correct the path")
            if not path.is_dir():
                raise CheckpointError(f"{path} is a file, not a model folder; name the folder that holds it")
            if is_adapter(path):
                raise CheckpointError(
                    f"{path} is a PEFT adapter, which is no model without its base; name it as an expert, over the "
                    "base_model that it was trained on"
                )
            config = read_config(path)
            weights = find_weights(path)
            support = find_support(path)
        except OSError as error:
            raise CheckpointError(f"the model folder {path} cannot be read: {error.strerror}") from None
        return cls(path, config, weights, support)

    @property
    def config(self) -> dict[str, Any]:
        """`config.json` as plain values."""
        return self._config

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that the digest covers."""
        index = () if self._weights.index is None else (self._weights.index,)
        return (*self.weight_files, *self.support_files, *index)

    @property
    def tokenizer_folder(self) -> Path:
        """The folder that holds the tokenizer or processor, if there is one."""
        return self.path

    @property
    def tokenizer_files(self) -> tuple[Path, ...]:
        """The tokenizer's and processor's files, sorted by name."""
        return tuple(file for file in self.support_files if file.name != CONFIG)

    @property
    def trained_on(self) -> str | None:
        """The base that the model itself says it was trained on; None where it says nothing."""
        return None

    def names(self) -> tuple[str, ...]:
        """Return the names of all tensors, sorted; legacy LayerNorm names appear under their modern form.

        Raises:
            CheckpointError: a stored tensor lacks others that are to be joined with it.
        """
        stored = set(self._weights.tensors)
        for conversion in self._conversions.values():
            stored -= conversion.stored.keys()
        return tuple(sorted(stored | self._conversions.keys()))

    def info(self, name: str) -> TensorInfo:
        """Return shape and dtype of a tensor.

        Raises:
            CheckpointError: there is no tensor of that name.
        """
        if name in self._weights.tensors:
            return self._weights.tensors[name].info
        if name in self._conversions:
            return self._conversions[name].loaded[name]
        raise CheckpointError(f"{self.path} has no tensor '{name}'")

    def tensor(self, name: str) -> Tensor:
        """Load one tensor, on the CPU, in its stored shape and dtype; not to be written to.

        The memory of one that is stored as it is, is a private mapping of the file: read when touched. Of one that is
        joined or cut, it is shared with the next call for the same.

        Raises:
            CheckpointError: there is no tensor of that name, or its file changed since it was opened.
        """
        self.info(name)
        if name in self._weights.tensors:
            return self._read(self._weights.tensors[name])
        conversion = self._conversions[name]
        with _converting:
            # A stack is asked for once for each of its matrices.
            if self._last is None or self._last[0] is not conversion:
                self._last = None
                self._last = (conversion, conversion.load(self.tensor))
            return self._last[1][name]

    def conversion(self, name: str) -> Conversion | None:
        """Return how a tensor is stored, where that is not as it is loaded."""
        return self._conversions.get(name)

    @cached_property
    def _conversions(self) -> dict[str, Conversion]:
        """Name of each tensor that is joined or cut on loading -> how."""
        stored = {name: tensor.info for name, tensor in self._weights.tensors.items()}
        found = rules_of(self._config).conversions(stored, str(self.path))
        return {name: conversion for conversion in found for name in conversion.loaded}

    def _read(self, stored: StoredTensor) -> Tensor:
        from safetensors import SafetensorError

        name = stored.info.name
        try:
            if stored.file not in self._handles:
                self._handles[stored.file] = MappedFile(stored.file)
            tensor = self._handles[stored.file].tensor(stored.key)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"the tensor '{name}' can no longer be read from {stored.file} ({error}); "
                "restore the file and run again"
            ) from None
        if tuple(tensor.shape) != stored.info.shape:
            raise CheckpointError(
                f"{stored.file} was replaced while it was in use: '{name}' had the shape {stored.info.shape}, "
                f"now {tuple(tensor.shape)}; run again"
            )
        return tensor

    def digest(self) -> str:
        """Return one SHA-256 of the bytes of all weight, config and tokenizer files, by relative name.

        Reads every byte, so call it once and keep it. The model card and other files do not count.
        """
        return digest_folder(self.path, self.files)

    @property
    def license(self) -> str | None:
        """The `license:` of the model card's front matter, None where it says nothing."""
        try:
            check_allowed(self.path / "README.md", "the model card")
            text = (self.path / "README.md").read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return None
        opening, _, rest = text.partition("\n")
        if opening.strip() != "---":
            return None
        try:
            card = yaml.safe_load(rest.partition("\n---")[0])
        except yaml.YAMLError:
            return None
        value = card.get("license") if isinstance(card, dict) else None
        if isinstance(value, list):
            return ", ".join(str(part) for part in value) or None
        return str(value) if value else None

    def close(self) -> None:
        """Let go of the open files; a later `tensor` opens them again."""
        self._handles.clear()
        self._last = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {len(self._weights.tensors)} tensors)"


def is_adapter(path: Path) -> bool:
    """Return whether a folder holds a PEFT adapter and no whole model."""
    return (path / ADAPTER_CONFIG).is_file() and not any((path / name).is_file() for name in (SINGLE, INDEX))


def find_support(path: Path) -> tuple[Path, ...]:
    """Return the config, tokenizer and processor files in a folder, sorted by name.

    Raises:
        UserError: one lies, behind a symbolic link, outside of the allowed folders.
    """
    support = sorted({file for pattern in _SUPPORT for file in path.glob(pattern) if file.is_file()})
    for file in support:
        check_allowed(file, "the model's files")
    return tuple(support)


def digest_folder(path: Path, files: Iterable[Path]) -> str:
    """Return one digest of files in a folder, under their names in it.

    Raises:
        CheckpointError: one cannot be read.
    """
    try:
        return digest_files((file.relative_to(path).as_posix(), file) for file in files)
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}") from None


def read_config(path: Path) -> dict[str, Any]:
    """Return the `config.json` in a folder.

    Raises:
        CheckpointError: there is none, it is damaged, or it asks for its own code to be run.
    """
    file = path / CONFIG
    if not file.is_file():
        raise CheckpointError(f"{path} has no {CONFIG}; name a folder that `save_pretrained` wrote")
    check_allowed(file, "the model's config")
    config = read_json_object(file)
    if "auto_map" in config:
        raise CheckpointError(
            f"{file} asks for its own code to be run ('auto_map'), which is refused; "
            "use an architecture that transformers itself has"
        )
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise CheckpointError(
            f"{file} says that the weights are quantised ({method}), and packed numbers cannot be merged; save the "
            "model as F32 or BF16"
        )
    return config
