"""What a kind of task has to say of itself; each kind is a module of its own beside this one.

Every stage goes through here and knows nothing else of a kind: where the encoder is in its checkpoints, how rows are
read and kept, how a model reads them, and what of the answers is right.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from bmm.checkpoint.architecture import Architecture
from bmm.checkpoint.reader import Checkpoint
from bmm.errors import CheckpointError
from bmm.evaluation.data import Row, Split, check_disjoint
from bmm.evaluation.model import TaskModel, build_module
from bmm.evaluation.scores import Metric
from bmm.kinds.settings import SplitSource


class Kind(ABC):
    """One kind of task. Instances hold nothing.

    Attributes:
        name: the recipe's word for it.
        architecture: what transformers calls its models.
        classes: whether a row's label is one class and `logits` are `(rows, classes)`.
        metrics: by the recipe's word, what its answers can be measured by; they take a row's `label`.
    """

    name: ClassVar[str]
    architecture: ClassVar[Architecture]
    metrics: ClassVar[Mapping[str, Metric]]

    classes: ClassVar[bool] = True

    def labels(self, checkpoint: Checkpoint, task: Any) -> tuple[str, ...]:  # noqa: ARG002 - other kinds ask the task
        """Return the expert's class names in the order of their ids; none where the task has no classes.

        Raises:
            CheckpointError: the configuration does not name them.
        """
        return class_names(checkpoint)

    def make_head(self, base: Checkpoint, task: Any, where: str) -> dict[str, torch.Tensor] | None:  # noqa: ARG002
        """Return a task's head under its model's own names, if it is made from the base; None if the expert has it.

        Args:
            base: the base checkpoint.
            task: the recipe's settings of this kind.
            where: the expert; begins every message.
        """
        return None

    def metric(self, name: str, labels: Sequence[str]) -> Metric:  # noqa: ARG002 - other kinds need the names
        """Return a metric by the recipe's word; `labels` are the class names."""
        return self.metrics[name]

    @abstractmethod
    def load_split(self, source: SplitSource, task: Any, labels: Sequence[str], folder: Path, where: str) -> Split:
        """Read one split of one expert's task.

        Args:
            source: what to read; `rows` takes a seeded sample without replacement, kept in file order.
            task: the recipe's settings of this kind.
            labels: the expert's class names; the index is the id.
            folder: what relative paths are taken from.
            where: expert and split; begins every message and names the split.

        Raises:
            DataError: rows that are missing, cannot be read, or have no label that the expert knows.
        """

    @abstractmethod
    def row(self, value: dict[str, Any]) -> Row:
        """Make a row of what its `document` returned."""

    def check_splits(self, where: str, splits: Mapping[str, Split]) -> None:
        """Refuse splits of one task that are not apart; `where` begins the message.

        Raises:
            DataError: two of them share a row.
        """
        check_disjoint(where, splits)

    def write_split(self, split: Split, folder: Path, name: str) -> None:
        """Write a split's rows into a folder, under a name."""
        (folder / f"{name}.jsonl").write_text(split.to_jsonl(), encoding="utf-8")

    def read_split(self, folder: Path, name: str) -> Split:
        """Read what `write_split` wrote.

        Raises:
            ArtefactDamagedError: it is not what was written.
        """
        return Split.from_jsonl(name, (folder / f"{name}.jsonl").read_text(encoding="utf-8"), self.row)

    @abstractmethod
    def build(
        self, config: Mapping[str, Any], folder: Path, reading: Mapping[str, Any], batch_size: int, task: str
    ) -> TaskModel:
        """Build a task's model without weights.

        Args:
            config: the expert's config.json.
            folder: where the expert's tokenizer or image processor is.
            reading: the task's settings that decide how a row is read, from `bmm.kinds.settings.reading`; and, for a
                model that will answer, those of `asking`.
            batch_size: rows in one forward pass.
            task: the expert's name, for messages.

        Raises:
            CheckpointError: the configuration describes no model of this kind, or what reads its rows is not there.
        """

    def bare(self, config: Mapping[str, Any], task: str) -> TaskModel:
        """Build a task's model without weights and without what reads rows: all that a merge without data needs.

        Args:
            config: the expert's config.json.
            task: the expert's name, for messages.

        Raises:
            CheckpointError: the configuration describes no model of this kind.
        """
        return TaskModel(task, build_module(config, self.architecture, task), self.architecture.prefix(dict(config)), 1)

    @abstractmethod
    def probe(self, model: TaskModel) -> dict[str, torch.Tensor]:
        """Return a small batch of inputs of the encoder's forward pass, of any values, of a `bare` model's too."""


def class_names(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return the class names of a checkpoint's configuration in the order of their ids.

    Raises:
        CheckpointError: the ids in config.json are not 0, 1, 2, …
    """
    config = checkpoint.config
    named = config.get("id2label") or {str(index): f"LABEL_{index}" for index in range(config.get("num_labels") or 2)}
    try:
        names = {int(index): str(name) for index, name in named.items()}
    except (AttributeError, ValueError):
        names = {}
    if sorted(names) != list(range(len(names))) or not names:
        raise CheckpointError(
            f"{checkpoint.path / 'config.json'}: id2label must name the classes 0, 1, 2, …; correct it"
        )
    return tuple(names[index] for index in range(len(names)))
