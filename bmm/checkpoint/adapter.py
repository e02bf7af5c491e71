"""A PEFT adapter over its base, read as the whole model that it stands for, one tensor at a time.

Nothing is written: a weight is computed when it is asked for, in float32, as PEFT's `merge_and_unload` computes it in
float32. The arithmetic is `bmm.checkpoint.lora`; here is which stored tensors belong to which weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bmm.checkpoint.adapter_tensors import ADAPTER_WEIGHTS, sorted_out
from bmm.checkpoint.allowed import check_allowed
from bmm.checkpoint.architecture import encoder_names
from bmm.checkpoint.lora import ADAPTER_CONFIG, LoraSettings, Orientation, adapted
from bmm.checkpoint.reader import CONFIG, Checkpoint, digest_folder, find_support, read_config
from bmm.checkpoint.shards import StoredTensor, read_header
from bmm.checkpoint.skeleton import Skeleton, build_skeleton
from bmm.checkpoint.tensors import TensorInfo
from bmm.digest import digest_json
from bmm.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

# One of these shows that a folder has what reads its rows.
_READERS = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model", "preprocessor_config.json")


@dataclass
class _Weight:
    """Where one tensor of the whole model comes from.

    Attributes:
        base: its name in the base.
        stored: the adapter's tensor that takes the base's place.
        module: the module whose low-rank adapter is added.
        rows: the adapter's tensor that takes the place of some rows, and which rows they are.
    """

    base: str | None = None
    stored: StoredTensor | None = None
    module: str | None = None
    rows: tuple[StoredTensor, tuple[int, ...]] | None = None


class AdapterCheckpoint(Checkpoint):
    """The model that a PEFT adapter makes of a base; reads like any other checkpoint.

    Attributes:
        base: the base, opened; closed with the adapter.
        weight_files: the adapter's weights and the base's.
        support_files: config and tokenizer files in the adapter's folder.
    """

    def __init__(self, path: Path, base: Checkpoint, settings: LoraSettings, stored: list[StoredTensor]) -> None:
        self.path = path
        self.base = base
        self.weight_files = (path / ADAPTER_WEIGHTS, *base.weight_files)
        self.support_files = find_support(path)
        self._settings = settings
        self._contents = sorted_out(path, stored)
        self._handles = {}
        self._last = None

    @classmethod
    def over(cls, path: Path, base: Checkpoint) -> AdapterCheckpoint:
        """Open the adapter in a folder over its base, without loading a tensor.

        Raises:
            CheckpointError: it is not LoRA or DoRA, has no safetensors weights, or is damaged.
            UserError: the folder or one of its files lies outside of `BMM_ALLOWED_FOLDERS`.
        """
        weights = path / ADAPTER_WEIGHTS
        for file in (path / ADAPTER_CONFIG, weights):
            check_allowed(file, "the adapter")
        settings = LoraSettings.read(path)
        if not weights.is_file():
            raise CheckpointError(
                f"{path} has no {ADAPTER_WEIGHTS}; save the adapter again with `save_pretrained` (pickled weights are "
                "never loaded)"
            )
        return cls(path, base, settings, read_header(weights))

    @property
    def own_files(self) -> tuple[Path, ...]:
        """Every file in the adapter's own folder that the digest covers."""
        return (self.path / ADAPTER_WEIGHTS, self.path / ADAPTER_CONFIG, *self.support_files)

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that the digest covers."""
        return (*self.own_files, *self.base.files)

    @property
    def tokenizer_folder(self) -> Path:
        """The adapter's folder where it has a tokenizer or processor, else the base's."""
        own = any(file.is_file() for pattern in _READERS for file in self.path.glob(pattern))
        return self.path if own else self.base.tokenizer_folder

    @property
    def tokenizer_files(self) -> tuple[Path, ...]:
        """The files of the tokenizer or processor, wherever it lies."""
        return super().tokenizer_files if self.tokenizer_folder == self.path else self.base.tokenizer_files

    @property
    def trained_on(self) -> str | None:
        """The base that the adapter says it was trained on."""
        return self._settings.base

    def own_digest(self) -> str:
        """Return the digest of the adapter's own files."""
        return digest_folder(self.path, self.own_files)

    def digest(self) -> str:
        """Return one SHA-256 of the adapter's files and of the base's."""
        return adapter_digest(self.own_digest(), self.base.digest())

    def names(self) -> tuple[str, ...]:
        """Return the names of all tensors of the whole model, as the adapter's model class has them, sorted."""
        return tuple(sorted(self._weight))

    def info(self, name: str) -> TensorInfo:
        """Return shape and dtype of a tensor; one that the adapter computes is float32.

        Raises:
            CheckpointError: there is no tensor of that name.
        """
        weight = self._found(name)
        info = weight.stored.info if weight.stored else self.base.info(weight.base or "")
        computed = weight.module is not None or weight.rows is not None
        return TensorInfo(name, info.shape, "F32" if computed else info.dtype)

    def tensor(self, name: str) -> Tensor:
        """Return one tensor, on the CPU, computed now if the adapter changes it.

        Raises:
            CheckpointError: there is no tensor of that name, the adapter does not fit the base, or a file changed.
        """
        import torch

        weight = self._found(name)
        tensor = self._read(weight.stored) if weight.stored else self.base.tensor(weight.base or "")
        if weight.rows is not None:
            stored, rows = weight.rows
            tensor = tensor.to(torch.float32, copy=True)
            tensor[list(rows)] = self._read(stored).to(torch.float32)
        if weight.module is None:
            return tensor
        parts, scaling = self._contents.parts[weight.module], self._settings.scaling(weight.module)
        if name.endswith(".bias"):
            return tensor.to(torch.float32) + self._read(parts["bias"]).to(torch.float32) * scaling
        magnitude = self._read(parts["magnitude"]) if "magnitude" in parts else None
        down, up = self._read(parts["down"]), self._read(parts["up"])
        return adapted(tensor, down, up, scaling, magnitude, self._orientation(weight.module, self.info(name).shape))

    def conversion(self, name: str) -> None:
        """Return nothing: an adapter stores no whole tensor in another form."""

    @property
    def config(self) -> dict[str, Any]:
        """The base's `config.json` with the adapter's own over it; without one, with the number of its classes."""
        return self._described

    @cached_property
    def _described(self) -> dict[str, Any]:
        config = {**self.base.config, "architectures": [self._skeleton.model_class]}
        if (self.path / CONFIG).is_file():
            return {**config, **read_config(self.path)}
        for name, weight in self._weight.items():
            own = weight.stored
            if own is None:
                continue
            rows = self.base.info(weight.base).shape[:1] if weight.base else ()
            if rows == (self.base.config.get("vocab_size"),):
                config["vocab_size"] = own.info.shape[0]
            if name in self._skeleton.outputs:
                classes = own.info.shape[0]
                config["id2label"] = {str(index): f"LABEL_{index}" for index in range(classes)}
                config["label2id"] = {f"LABEL_{index}": index for index in range(classes)}
                config.pop("num_labels", None)
        return config

    def close(self) -> None:
        """Let go of the open files; a later `tensor` opens them again."""
        super().close()
        self.base.close()

    def __repr__(self) -> str:
        return f"AdapterCheckpoint({str(self.path)!r}, over {str(self.base.path)!r})"

    @cached_property
    def _skeleton(self) -> Skeleton:
        return build_skeleton(self.base.config, self._settings.task_type, self._settings.model_class)

    @cached_property
    def _weight(self) -> dict[str, _Weight]:
        weights = {name: _Weight(base=stored) for name, stored in _base_names(self.base, self._skeleton).items()}
        for name, stored in self._contents.whole.items():
            if name not in weights and name not in self._skeleton.shapes:
                raise CheckpointError(self._homeless(stored))
            weights.setdefault(name, _Weight()).stored = stored
        for module, parts in self._contents.parts.items():
            self._add_parts(module, parts, weights)
        self._keep_ties(weights)
        if (lacking := sorted(self._skeleton.outputs - weights.keys())) and not self._skeleton.outputs & weights.keys():
            raise CheckpointError(
                f"{self.path} holds no head: neither the adapter nor its base has the tensor '{lacking[0]}'; name its "
                "module in modules_to_save when training, or save the whole model with `merge_and_unload()`"
            )
        return weights

    def _add_parts(self, module: str, parts: Mapping[str, StoredTensor], weights: Mapping[str, _Weight]) -> None:
        weight = weights.get(f"{module}.weight")
        bias = weights.get(f"{module}.bias")
        anything = next(iter(parts.values()))
        if weight is None or ("bias" in parts and bias is None):
            raise CheckpointError(self._homeless(anything))
        info = weight.stored.info if weight.stored else self.base.info(weight.base or "")
        if "tokens" in parts:
            rows = self._token_rows(module)
            shape = parts["tokens"].info.shape
            if shape != (len(rows), *info.shape[1:]) or max(rows) >= info.shape[0]:
                raise CheckpointError(self._unfit(f"{module}.weight", info.shape, parts["tokens"]))
            weight.rows = (parts["tokens"], rows)
        if ("down" in parts) != ("up" in parts) or ("down" not in parts and parts.keys() - {"tokens"}):
            raise CheckpointError(
                f"{anything.file} has only one part of the adapter of {module}; save or download the adapter again"
            )
        if "down" in parts:
            down, up = parts["down"].info.shape, parts["up"].info.shape
            orientation = self._orientation(module, info.shape)
            wanted = down[1:] + up[:1] if orientation == "columns" else up[:1] + down[1:]
            rank = self._settings.rank_of(module)
            if wanted != info.shape or down[0] != rank or up[1] != rank:
                raise CheckpointError(self._unfit(f"{module}.weight", info.shape, parts["down"], parts["up"]))
            weight.module = module
        if bias is not None and "bias" in parts:
            bias.module = module

    def _keep_ties(self, weights: dict[str, _Weight]) -> None:
        """Give a change to every name of a tied tensor, as merging in place does; a trained copy of one unties it."""
        for names in self._skeleton.tied:
            changed = [name for name in names if name in weights and weights[name] != _Weight(weights[name].base)]
            if not changed:
                continue
            first = weights[changed[0]]
            stored_in_base = next(
                (weights[name].base for name in names if name in weights and weights[name].base), None
            )
            for name in names:
                if name in changed:
                    continue
                if first.stored is None or ".base_layer." in first.stored.key or self._settings.keeps_ties:
                    if name in weights:
                        weights[name] = first
                else:
                    weights[name] = _Weight(base=stored_in_base)

    def _orientation(self, module: str, shape: tuple[int, ...]) -> Orientation:
        known = self._skeleton.orientations.get(module)
        if known is not None:
            return known
        # A module that transformers renames on loading is known by its weight's shape.
        parts = self._contents.parts[module]
        outputs, inputs = parts["up"].info.shape[:1], parts["down"].info.shape[1:]
        if outputs + inputs == inputs + outputs:
            return "columns" if self._settings.transposed else "rows"
        return "columns" if shape == inputs + outputs else "rows"

    def _token_rows(self, module: str) -> tuple[int, ...]:
        for name, rows in self._settings.token_indices.items():
            if module == name or module.endswith(f".{name}") or not name:
                return rows
        raise CheckpointError(
            f"{self.path / ADAPTER_CONFIG} does not say in trainable_token_indices which rows of {module} were "
            "trained; save the adapter again"
        )

    def _found(self, name: str) -> _Weight:
        try:
            return self._weight[name]
        except KeyError:
            raise CheckpointError(f"{self.path} has no tensor '{name}'") from None

    def _homeless(self, stored: StoredTensor) -> str:
        return (
            f"{stored.file} has the tensor '{stored.key}', for which the base {self.base.path} has no place; name the "
            f"base that the adapter was trained on ('{self.trained_on}') as base_model"
        )

    def _unfit(self, name: str, shape: tuple[int, ...], *stored: StoredTensor) -> str:
        sizes = " and ".join(f"'{part.key}' {part.info.shape}" for part in stored)
        return (
            f"{self.path} does not fit the base {self.base.path}: {sizes} for '{name}' of shape {shape}; name the base "
            f"that the adapter was trained on ('{self.trained_on}') as base_model"
        )


def adapter_digest(own: str, base: str) -> str:
    """Return the digest of an adapter over a base, from the digests of both."""
    return digest_json({"adapter": own, "base": base})


def _base_names(base: Checkpoint, skeleton: Skeleton) -> dict[str, str]:
    """Return name in the adapter's model class -> name in the base, as `from_pretrained` would load the base.

    The base's own head is left out unless the class has it too.
    """
    prefix = f"{skeleton.prefix}." if skeleton.prefix else ""
    encoder = encoder_names(base, skeleton.base_prefix)
    names = {prefix + name: stored for name, stored in encoder.items()}
    # What the class does not have is passed over on loading: Whisper's decoder, or the pooler of a ViT.
    names = {name: stored for name, stored in names.items() if name in skeleton.shapes}
    heads = set(base.names()) - set(encoder.values())
    return names | {name: name for name in heads if name in skeleton.shapes}
