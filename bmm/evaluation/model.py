"""Running a text classifier whose weights change many times while its shape, head and rows stay.

Lives here: `TaskModel` (one classifier of the `transformers` library with its tokenizer) and
its batches. Does not live here: reading weights from disk (`bmm.checkpoint`), what the logits are worth
(`bmm.evaluation.metrics`).

Models always compute in float32: weights of any dtype are cast on their way in, so that merges are compared
on the same arithmetic whatever dtype they are published in.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from bmm.errors import BMMError, CheckpointError, DataError
from bmm.evaluation.data import Row
from bmm.evaluation.tokens import TokenisedRows, batches, load_tokenizer, quiet_transformers, tokenised_rows

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


class TaskModel:
    """One task's classifier in eval mode, float32, on the CPU; its weights come in from outside.

    Encoder names are canonical: without the head model's `base_model_prefix`. Encoder names that `load_head`
    was given (a pooler that the base lacks, say) travel with the head: they stay this model's own.
    """

    def __init__(
        self, task: str, model: Any, tokenizer: Any, tokenizer_folder: Path, max_length: int, batch_size: int
    ) -> None:
        self.task = task
        self.module: Any = model
        self.encoder: Any = model.base_model
        self.batch_size = batch_size
        self._prefix = f"{model.base_model_prefix}."
        self._tokenizer = tokenizer
        self._folder = tokenizer_folder
        self._max_length = max_length
        self._travelling: frozenset[str] = frozenset()
        self._head_loaded = False
        self._state = _EncoderState()
        self._shares = False

    @classmethod
    def build(
        cls,
        config: Mapping[str, Any],
        tokenizer_folder: Path,
        max_length: int,
        batch_size: int,
        *,
        task: str,
    ) -> TaskModel:
        """Build a classifier of the shape that `config` (a config.json) describes, without weights.

        Args:
            config: with `model_type` and the expert's own labels; code that it refers to is never run.
            tokenizer_folder: where the expert's tokenizer files are.
            max_length: tokens a row; longer rows are cut.
            batch_size: rows in one forward pass.
            task: the expert's name, for messages.

        Raises:
            CheckpointError: the configuration describes no text classifier, or the folder has no tokenizer.
        """
        tokenizer = load_tokenizer(Path(tokenizer_folder))
        values = {key: value for key, value in config.items() if key not in _NOT_CONFIGURATION}
        try:
            # Constructors compute buffers such as position ids; only weights are left as memory has them.
            with quiet_transformers(), no_init_weights():
                settings = transformers.AutoConfig.for_model(config["model_type"], **values)
                model = transformers.AutoModelForSequenceClassification.from_config(
                    settings, dtype=torch.float32, trust_remote_code=False
                )
        except Exception as error:
            reason = "it has no model_type" if isinstance(error, KeyError) else " ".join(str(error).split())[:300]
            raise CheckpointError(
                f"the config.json of {task} does not describe a text classifier that transformers has: {reason}"
            ) from error
        model.tie_weights()
        model.requires_grad_(False).eval()
        if model.base_model is model:
            raise CheckpointError(f"the model of {task} has no encoder apart from its head ({type(model).__name__})")
        return cls(task, model, tokenizer, Path(tokenizer_folder), max_length, batch_size)

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

    def tokenise(self, rows: Sequence[Row]) -> TokenisedRows:
        """Return the rows as tokens, cut at `max_length`, sorted by length for batching.

        Raises:
            DataError: a row becomes no tokens, or more than the model has positions for.
            CheckpointError: the tokenizer has tokens that the model does not.
        """
        accepted = inspect.signature(self.module.forward).parameters
        types = getattr(self.module.config, "type_vocab_size", 2)
        # A model of one token type assumes it when told nothing, and fails when told of a second one.
        refused = {"token_type_ids"} if "token_type_ids" not in accepted or types < 2 else set()
        tokenised = tokenised_rows(self._tokenizer, rows, self._max_length, refused)
        if not len(tokenised):
            return tokenised
        lengths = tokenised.lengths
        if min(lengths) == 0:
            row = rows[lengths.index(0)]
            raise DataError(
                f"{self.task}: the tokenizer in {self._folder} makes no token of the text {row.text[:60]!r}"
            )
        positions = _positions(self.encoder)
        if positions is not None and max(lengths) > positions:
            raise DataError(
                f"{self.task}: a row has {max(lengths)} tokens, but the model has {positions} positions; "
                f"set task.max_length to at most {positions}"
            )
        vocabulary = self.encoder.get_input_embeddings().num_embeddings
        largest = max(max(ids) for ids in tokenised.columns["input_ids"])
        if largest >= vocabulary:
            raise CheckpointError(
                f"{self.task}: the tokenizer in {self._folder} gives the token {largest}, but the model has "
                f"only {vocabulary} tokens; use the tokenizer that the model was trained with"
            )
        return tokenised

    def batches(self, tokenised: TokenisedRows) -> Iterator[dict[str, Tensor]]:
        """Return `batches` of this model's batch size."""
        return batches(tokenised, self.batch_size)

    def logits(self, tokenised: TokenisedRows, bar: Any = None) -> Tensor:
        """Return the logits, (rows, classes) float32, in the order the rows were given.

        Args:
            tokenised: from `tokenise` of a model with the same tokenizer.
            bar: a `bmm.progress.Bar`, advanced by the rows of each batch.

        Raises:
            BMMError: no weights were loaded yet.
            FloatingPointError: a logit is not finite.
        """
        if not (self._head_loaded and self._state.loaded):
            raise BMMError(f"the model of {self.task} has no weights yet; load its head and its encoder first")
        result = torch.empty(len(tokenised), self.module.config.num_labels, dtype=torch.float32)
        done = 0
        with torch.inference_mode():
            for batch in self.batches(tokenised):
                size = len(batch["input_ids"])
                result[list(tokenised.order[done : done + size])] = self.module(
                    **batch, return_dict=True
                ).logits.float()
                done += size
                if bar is not None:
                    bar.advance(size)
        if not torch.isfinite(result).all():
            raise FloatingPointError(f"the logits of {self.task} are not finite")
        return result


def _named(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers by name; tied ones under each of their names."""
    return dict(module.state_dict(keep_vars=True))


def _computed(module: nn.Module) -> set[str]:
    """Return the buffers that a model computes itself; older checkpoints hold them all the same."""
    return {name for name, _ in module.named_buffers()} - set(module.state_dict())


def _positions(encoder: nn.Module) -> int | None:
    """Return how many tokens a learned position table has room for, or None without one.

    Position tables with a padding index (RoBERTa) count from the place after it.
    """
    rooms = [
        table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
        for name, table in encoder.named_modules()
        if name.endswith("position_embeddings") and isinstance(table, nn.Embedding)
    ]
    return min(rooms, default=None)


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
    reached = {id(targets[name]) for name in given}
    for name, target in targets.items():
        if id(target) not in reached:
            raise BMMError(f"{what} is not given {name}")
    with torch.no_grad():
        for name, tensor in given.items():
            targets[name].copy_(tensor)
