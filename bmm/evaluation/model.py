"""Running a task's model whose weights change many times while its shape, head and rows stay.

Lives here: `TaskModel` (one model of the `transformers` library with what reads its rows), and building one without
weights. Does not live here: reading weights from disk (`bmm.checkpoint`), how rows become batches (`bmm.kinds`), what
the answers are worth (`bmm.evaluation.metrics`).

Models always compute in float32: weights of any dtype are cast on their way in, so that merges are compared
on the same arithmetic whatever dtype they are published in.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from bmm.checkpoint.architecture import Architecture
from bmm.errors import BMMError, CheckpointError, one_line
from bmm.evaluation.tokens import quiet_transformers

# Said of the file that a configuration came from; refused or without meaning when one is built from values.
_NOT_CONFIGURATION = frozenset(
    {
        "model_type",
        "auto_map",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "_name_or_path",
        "_attn_implementation",
    }
)


@dataclass
class _EncoderState:
    """Whether the weights of an encoder hold anything yet; shared by all models that share the encoder."""

    loaded: bool = False


class Prepared(Protocol):
    """Rows as a model takes them, ready to be cut into batches."""

    def __len__(self) -> int:
        """Return the number of rows."""

    @property
    def order(self) -> Sequence[int]:
        """Row indices as batches take them."""

    def batches(self, batch_size: int) -> Iterator[dict[str, Tensor]]:
        """Yield keyword tensors of the encoder's forward pass, rows first; `attention_mask` only with padding."""


class Reader(Protocol):
    """Turns the rows of one task into what its model takes."""

    def prepare(self, rows: Sequence[Any]) -> Prepared:
        """Return the rows as the model takes them.

        Raises:
            UserError: a row that the model cannot take.
        """


class TaskModel:
    """One task's model in eval mode, float32, on the CPU; its weights come in from outside.

    Encoder names are canonical: without the name under which the model keeps its encoder. Encoder names that
    `load_head` was given (a pooler that the base lacks, say) travel with the head: they stay this model's own.

    Args:
        task: the expert's name, for messages.
        module: a model of transformers, from `build_module`.
        prefix: the name under which it keeps its encoder; empty where it is the encoder itself.
        batch_size: rows in one forward pass.
        reader: what reads the task's rows; None for a model that is only fed.
    """

    def __init__(self, task: str, module: Any, prefix: str, batch_size: int, reader: Reader | None = None) -> None:
        self.task = task
        self.module: Any = module
        self.encoder: Any = module.get_submodule(prefix)
        self.batch_size = batch_size
        self.reader = reader
        self._prefix = f"{prefix}." if prefix else ""
        self._travelling: frozenset[str] = frozenset()
        self._head_loaded = False
        self._state = _EncoderState()
        self._shares = False
        takes = inspect.signature(self.encoder.forward).parameters
        # Others (BART) shift inside the encoder itself.
        self._shifts = hasattr(module, "_shift_right") and "decoder_input_ids" in takes

    def load_head(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy in everything that is this task's own, by the keys of the expert's checkpoint.

        Keys outside the encoder (`classifier.weight`) must all be there; keys inside it
        (`bert.pooler.dense.weight`) become this model's own and are no longer taken by `load_encoder`.

        Raises:
            BMMError: a name is missing, unexpected or of another shape, or a model that shares its encoder is
                given other encoder names than before.
        """
        everything = _named(self.module)
        head = {key: target for key, target in everything.items() if not key.startswith(self._prefix)}
        inside = {key: everything[key] for key in tensors if key.startswith(self._prefix) and key in everything}
        travelling = frozenset(key.removeprefix(self._prefix) for key in inside)
        if self._shares and travelling != self._travelling:
            raise BMMError(f"the head of {self.task} changes which encoder weights are its own after they were shared")
        _copy({**head, **inside}, tensors, _computed(self.module), f"the head of {self.task}")
        if self._travelling - travelling:
            # What the earlier head brought is nobody's now, until an encoder is loaded that has it.
            self._state.loaded = False
        self._travelling = travelling
        self._head_loaded = True

    def answer_in_order(self, order: Sequence[int]) -> None:
        """Answer from now on with the head's classes in another order: at each place the class of the id in `order`."""

        def reordered(_module: Any, _inputs: Any, output: Any) -> None:
            output.logits = output.logits[..., list(order)]

        self.module.register_forward_hook(reordered)

    def load_encoder(self, state: Mapping[str, Tensor]) -> None:
        """Copy in an encoder, canonical name -> tensor, for this model and all that share its encoder.

        Tensors are cast to float32. Names that the model computes itself (position ids in old checkpoints)
        are passed over. Nothing is changed where anything is wrong.

        Raises:
            BMMError: a name is missing, unexpected or of another shape.
        """
        targets = {name: target for name, target in _named(self.encoder).items() if name not in self._travelling}
        _copy(targets, state, _computed(self.encoder), f"the encoder of {self.task}")
        self._state.loaded = True

    def expect_encoder(self, names: Collection[str], give: Callable[[str], Tensor]) -> None:
        """Make ready for parameters that come and go: check that each will be given, and copy in what is no parameter.

        Args:
            names: canonical names of what `give` gives, all of `encoder_names`.
            give: gives a tensor by name.

        Raises:
            BMMError: a name is missing, or a buffer is of another shape.
        """
        parameters = {name for name, _ in self.encoder.named_parameters(remove_duplicate=False)}
        targets = {name: target for name, target in _named(self.encoder).items() if name not in self._travelling}
        what = f"the encoder of {self.task}"
        _require_all(targets, names, what)
        buffers = {name: target for name, target in targets.items() if name not in parameters}
        _copy(buffers, {name: give(name) for name in buffers}, (), what)

    def encoder_names(self) -> list[str]:
        """Return the canonical names that `load_encoder` takes, in model order, tied ones too."""
        return [name for name in _named(self.encoder) if name not in self._travelling]

    def share_encoder(self, other: TaskModel) -> None:
        """Use the encoder weights of `other` from now on: loading either one loads both.

        Tensors are shared, not modules, so that weights that travel with each head, hooks and configuration
        stay apart.

        Raises:
            BMMError: a head is not loaded yet, or the encoders differ in names or shapes.
        """
        if not (self._head_loaded and other._head_loaded):
            raise BMMError(f"the heads of {self.task} and {other.task} must be loaded before their encoder is shared")
        mine, theirs = (
            {name: _named(model.encoder)[name] for name in model.encoder_names()} for model in (self, other)
        )
        for name in dict.fromkeys([*mine, *theirs]):
            if name not in mine or name not in theirs or mine[name].shape != theirs[name].shape:
                raise BMMError(f"{self.task} and {other.task} cannot share one encoder: {name} is not the same in both")
        for name in mine:
            path, _, leaf = name.rpartition(".")
            setattr(self.encoder.get_submodule(path), leaf, theirs[name])
        self._state = other._state
        self._shares = other._shares = True

    def prepare(self, rows: Sequence[Any]) -> Prepared:
        """Return the rows as this model takes them.

        Raises:
            BMMError: the model was built without a reader.
            UserError: a row that the model cannot take.
        """
        if self.reader is None:
            raise BMMError(f"the model of {self.task} was built without anything that reads its rows")
        return self.reader.prepare(rows)

    def batches(self, prepared: Prepared) -> Iterator[dict[str, Tensor]]:
        """Yield batches of this model's batch size, as its encoder takes them."""
        for batch in prepared.batches(self.batch_size):
            yield self.completed(batch)

    def completed(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a batch with what the decoder of an encoder-decoder reads, which its head makes of `input_ids` (T5).

        That is every token one place later, so that a decoder's row is padding where the encoder's is.
        """
        if not self._shifts or "decoder_input_ids" in batch:
            return batch
        return {**batch, "decoder_input_ids": self.module._shift_right(batch["input_ids"])}

    def require_weights(self) -> None:
        """Refuse to answer without weights.

        Raises:
            BMMError: head or encoder were not loaded yet.
        """
        if not (self._head_loaded and self._state.loaded):
            raise BMMError(f"the model of {self.task} has no weights yet; load its head and its encoder first")

    def logits(self, prepared: Prepared, bar: Any = None) -> Tensor:
        """Return the logits, (rows, classes) float32, in the order the rows were given.

        Args:
            prepared: from `prepare` of a model that reads rows in the same way.
            bar: a `bmm.progress.Bar`, advanced by the rows of each batch.

        Raises:
            BMMError: no weights were loaded yet.
            FloatingPointError: a logit is not finite.
        """
        self.require_weights()
        result = torch.empty(len(prepared), self.module.config.num_labels, dtype=torch.float32)
        done = 0
        with torch.inference_mode():
            for batch in self.batches(prepared):
                logits = self.module(**batch, return_dict=True).logits.float()
                result[list(prepared.order[done : done + len(logits)])] = logits
                done += len(logits)
                if bar is not None:
                    bar.advance(len(logits))
        if not torch.isfinite(result).all():
            raise FloatingPointError(f"the logits of {self.task} are not finite")
        return result


def build_module(config: Mapping[str, Any], architecture: Architecture, task: str) -> Any:
    """Build a model of the shape that a config.json describes, float32, in eval mode, without weights.

    Args:
        config: with `model_type` and the expert's own labels; code that it refers to is never run.
        architecture: what transformers calls such a model.
        task: the expert's name, for messages.

    Raises:
        CheckpointError: the configuration describes no such model, or one without an encoder apart from its head.
    """
    values = {key: value for key, value in config.items() if key not in _NOT_CONFIGURATION}
    try:
        # Constructors compute buffers such as position ids; only weights are left as memory has them.
        with quiet_transformers(), no_init_weights():
            settings = transformers.AutoConfig.for_model(config["model_type"], **values)
            model = getattr(transformers, architecture.auto_class).from_config(
                settings, dtype=torch.float32, trust_remote_code=False
            )
    except Exception as error:
        reason = "it has no model_type" if isinstance(error, KeyError) else one_line(error)
        raise CheckpointError(
            f"the config.json of {task} does not describe a model that transformers has as a {architecture.noun}: "
            f"{reason}"
        ) from error
    model.tie_weights()
    model.requires_grad_(False).eval()
    return model


def _named(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers by name; tied ones under each of their names."""
    return dict(module.state_dict(keep_vars=True))


def _computed(module: nn.Module) -> set[str]:
    """Return the buffers that a model computes itself; older checkpoints hold them all the same."""
    return {name for name, _ in module.named_buffers()} - set(module.state_dict())


def _copy(targets: Mapping[str, Tensor], given: Mapping[str, Tensor], computed: Iterable[str], what: str) -> None:
    """Copy `given` into `targets`, all or nothing; every target must be reached, by any of its names."""
    given = {name: tensor for name, tensor in given.items() if name in targets or name not in set(computed)}
    for name, tensor in given.items():
        if name not in targets:
            raise BMMError(f"{what} is given {name}, which it does not have")
        if tensor.shape != targets[name].shape:
            raise BMMError(
                f"{what} is given {name} of shape {tuple(tensor.shape)}, but has it as {tuple(targets[name].shape)}"
            )
    _require_all(targets, given, what)
    with torch.no_grad():
        for name, tensor in given.items():
            targets[name].copy_(tensor)


def _require_all(targets: Mapping[str, Tensor], given: Collection[str], what: str) -> None:
    """Refuse where a target is reached by none of its names."""
    reached = {id(targets[name]) for name in given}
    for name, target in targets.items():
        if id(target) not in reached:
            raise BMMError(f"{what} is not given {name}")
