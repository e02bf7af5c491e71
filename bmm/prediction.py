"""What a model answers on a split: logits, kept as artefacts, so that no pair of model and rows is run twice.

A model here is an encoder (known by the digest of its weights) with one task's head. The models themselves are
`bmm.evaluation.model`; numbers made from the answers are `bmm.evaluation.metrics`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import torch
from safetensors.torch import load_file, save_file

from bmm.checkpoint.layout import Layout, dotted
from bmm.checkpoint.mapped import mapped
from bmm.checkpoint.reader import Checkpoint
from bmm.checkpoint.vocabulary import EXTRA, with_vocabulary
from bmm.evaluation.data import Split
from bmm.evaluation.metrics import Measured
from bmm.evaluation.model import Prepared, TaskModel
from bmm.evaluation.racing import PARTS, parts
from bmm.evaluation.vocabulary import extend
from bmm.kinds.registry import kind_of
from bmm.kinds.settings import asking, reading
from bmm.progress import progress
from bmm.sources import Expert
from bmm.stages.request import Work
from bmm.store import Artefact, Draft

HEAD = "head.safetensors"
"""In an `expert` artefact: the head, where it is made from the base."""

EncoderState = Mapping[str, torch.Tensor]


class Panel:
    """The tasks of a merge, each with its expert's head, around one encoder whose weights are swapped.

    Args:
        work: the way to the store.
        experts: the experts with their tasks.
        artefacts: each expert's verified `expert` artefact, which holds its rows.
        layout: which tensors are shared and which travel with a head.
        batch_size: rows in one forward pass.
        heads: by expert, tensors that stand in for those of its own head. What an encoder is known by must say so.
        orders: by expert, the ids of its classes in such a head, where that has them in another order; likewise.
    """

    def __init__(
        self,
        work: Work,
        experts: Sequence[Expert],
        artefacts: Mapping[str, Artefact],
        layout: Layout,
        batch_size: int,
        heads: Mapping[str, Mapping[str, torch.Tensor]] = MappingProxyType({}),
        orders: Mapping[str, Sequence[int]] = MappingProxyType({}),
    ) -> None:
        self._heads = heads
        self._orders = orders
        self._work = work
        self._experts = {expert.name: expert for expert in experts}
        self._artefacts = artefacts
        self._layout = layout
        self._batch_size = batch_size
        self._models: dict[str, TaskModel] = {}
        self._splits: dict[tuple[str, str], Split] = {}
        self._prepared: dict[tuple[str, str], Prepared] = {}
        self._pieces: dict[tuple[str, str], list[tuple[list[int], Prepared | None]]] = {}

    def with_heads(
        self,
        heads: Mapping[str, Mapping[str, torch.Tensor]],
        orders: Mapping[str, Sequence[int]] = MappingProxyType({}),
    ) -> Panel:
        """Return the same panel with, by expert, tensors that stand in for those of its own head.

        Args:
            heads: by expert, the tensors.
            orders: by expert, for each of its classes its id in a head that has them in another order.
        """
        experts = tuple(self._experts.values())
        return Panel(self._work, experts, self._artefacts, self._layout, self._batch_size, heads, orders)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in the recipe's order."""
        return tuple(self._experts)

    def has(self, split: str) -> bool:
        """Say whether there are rows of a split; then every task has some."""
        return all(split in artefact.read_json("expert.json")["splits"] for artefact in self._artefacts.values())

    def rows(self, task: str, split: str) -> int:
        """Return the number of rows of a split."""
        return len(self._split(task, split).rows)

    def measured(self, task: str, split: str, answers: torch.Tensor, rows: Sequence[int] | None = None) -> Measured:
        """Return what a model's answers on a split, or on some of its rows, are worth, by the task's metric."""
        said = self._experts[task].task
        metric = kind_of(said["kind"]).metric(said["metric"], self.class_names(task))
        labels = self.labels(task, split)
        return Measured(metric, metric.statistics(answers, labels if rows is None else [labels[row] for row in rows]))

    def class_names(self, task: str) -> list[str]:
        """Return the names of a task's classes in the expert's order, none where it has no classes."""
        return list(self._artefacts[task].read_json("expert.json")["labels"])

    def classes(self, task: str, split: str) -> list[int] | None:
        """Return the class id of every row of a split, None where a task's answers are not scores of classes."""
        if not self.has_classes(task):
            return None
        return [int(label) for label in self.labels(task, split)]

    def has_classes(self, task: str) -> bool:
        """Say whether a task's answers are scores of classes, `(rows, classes)`."""
        return kind_of(self._experts[task].task["kind"]).classes

    def labels(self, task: str, split: str) -> list[Any]:
        """Return the label of every row of a split, whatever the kind of task calls one."""
        return [row.label for row in self._split(task, split).rows]

    def answers_in_parts(
        self, state: EncoderState, split: str
    ) -> Generator[dict[str, tuple[list[int], torch.Tensor]], None, None]:
        """Run encoder weights on one split, a part of every task's rows after the other; nothing is kept.

        Yields:
            by task, the indices of the rows of this part and the answers to them. Tasks whose answers are not scores of
            classes come whole with the last part.

        Raises:
            FloatingPointError: an answer is not finite.
        """
        self._load(state)
        with progress(f"evaluating {split}", sum(self.rows(task, split) for task in self.tasks)) as bar:
            for turn in range(PARTS):
                found = {}
                for task in self.tasks:
                    indices, prepared = self._piece(task, split, turn)
                    if prepared is not None:
                        found[task] = (indices, self._model(task).logits(prepared, bar))
                yield found

    def predictions(
        self, encoder: str, state: Callable[[], EncoderState], tasks: Sequence[str], split: str, what: str
    ) -> dict[str, Measured]:
        """Return, by task, what an encoder's answers are worth; takes what `logits` does."""
        answers = self.logits(encoder, state, tasks, split, what)
        return {task: self.measured(task, split, found) for task, found in answers.items()}

    def logits(
        self, encoder: str, state: Callable[[], EncoderState], tasks: Sequence[str], split: str, what: str
    ) -> dict[str, torch.Tensor]:
        """Return an encoder's answers by task; runs only what the store does not have.

        Args:
            encoder: digest of the encoder's weights.
            state: gives the weights; called only if something must be run.
            tasks: the tasks wanted.
            split: `validation` or `test`.
            what: the model's name for the progress bar.
        """
        found = {}
        loaded = False
        with progress(f"{what} on {split}", sum(self.rows(task, split) for task in tasks)) as bar:
            for task in tasks:

                def make(draft: Draft, task: str = task) -> None:
                    nonlocal loaded
                    if not loaded:
                        self._load(state())
                        loaded = True
                    answers = self._model(task).logits(self._ready(task, split), bar)
                    save_file({"logits": answers}, draft.path / "logits.safetensors")

                artefact = self._work.read(self._work.obtain("predictions", self._inputs(encoder, task, split), make))
                found[task] = load_file(artefact.file("logits.safetensors"))["logits"]
        return found

    def _inputs(self, encoder: str, task: str, split: str) -> dict[str, Any]:
        # An encoder is known by the digest of all its weights, so what a head brings in their place is said apart.
        travelling = self._travelling(task)
        return {
            "encoder": encoder,
            **({"travelling": travelling} if travelling else {}),
            "head": self._experts[task].model.digest,
            "reading": reading(self._experts[task].task),
            "asking": [asking(self._experts[task].task), made_head(self._artefacts[task])],
            "batch_size": self._batch_size,
            "rows": self._split(task, split).digest,
        }

    def _travelling(self, task: str) -> list[str]:
        """Return the base's parameters that are not merged here because an expert lacks them, and this head brings."""
        heads, prefix = self._layout.heads[task], dotted(self._layout.prefix)
        return [name for name in self._layout.unmatched if f"{prefix}{name}" in heads]

    def _split(self, task: str, split: str) -> Split:
        known = self._splits.get((task, split))
        if known is None:
            known = self._splits[task, split] = read_split(self._artefacts[task], split)
        return known

    def _model(self, task: str) -> TaskModel:
        if task not in self._models:
            expert = self._experts[task]
            with expert.model.open() as checkpoint:
                model = build_model(checkpoint, expert, self._batch_size, self._layout)
                own = head_tensors(checkpoint, self._layout, expert.name, self._artefacts[task])
                model.load_head({**own, **self._heads.get(task, {})})
            if task in self._orders:
                model.answer_in_order(self._orders[task])
            if self._models:
                model.share_encoder(next(iter(self._models.values())))
            self._models[task] = model
        return self._models[task]

    def _ready(self, task: str, split: str) -> Prepared:
        known = self._prepared.get((task, split))
        if known is None:
            known = self._prepared[task, split] = self._model(task).prepare(self._split(task, split).rows)
        return known

    def _piece(self, task: str, split: str, turn: int) -> tuple[list[int], Prepared | None]:
        """Return the indices of the rows of a task's part, and the rows made ready; None where it has none."""
        if (task, split) not in self._pieces:
            count = self.rows(task, split)
            if self.has_classes(task):
                rows = self._split(task, split).rows
                pieces: list[tuple[list[int], Prepared | None]] = []
                for indices in parts(task, count):
                    chosen = [rows[index] for index in indices]
                    pieces.append((indices, self._model(task).prepare(chosen) if chosen else None))
            else:
                pieces = [([], None)] * (PARTS - 1) + [(list(range(count)), self._ready(task, split))]
            self._pieces[task, split] = pieces
        return self._pieces[task, split][turn]

    def _load(self, state: EncoderState) -> None:
        # One encoder serves every task, so loading it into one model, once all share it, loads it into all.
        models = [self._model(task) for task in self.tasks]
        models[0].load_encoder(state)


def build_model(checkpoint: Checkpoint, expert: Expert, batch_size: int, layout: Layout) -> TaskModel:
    """Return an expert's model with what reads its rows, if it has some; its weights are not loaded.

    Its tables have the base's vocabulary, and behind it rows of the expert's own, which come with its head.
    """
    kind, config = kind_of(expert.task["kind"]), checkpoint.config
    if layout.vocabulary is not None:
        config = with_vocabulary(config, layout.vocabulary)
    if expert.data:
        model = kind.build(
            config,
            checkpoint.tokenizer_folder,
            {**reading(expert.task), **asking(expert.task)},
            batch_size,
            expert.name,
        )
    else:
        # Without rows nothing that reads them, a tokenizer say, need be there.
        model = kind.bare(config, expert.name)
    extend(model.module, layout.extra_rows(expert.name))
    return model


def head_tensors(checkpoint: Checkpoint, layout: Layout, expert: str, artefact: Artefact) -> dict[str, torch.Tensor]:
    """Return what travels with one expert's head, under its model's own names.

    Args:
        checkpoint: the expert's.
        layout: which of its tensors these are.
        expert: its name.
        artefact: the expert's `expert` artefact, which holds the head where it was made from the base.
    """
    made = artefact.path / HEAD
    if made.is_file():
        head: dict[str, torch.Tensor] = load_file(made)
        return head
    tensors = {name: checkpoint.tensor(stored) for name, stored in layout.heads[expert].items()}
    own = own_rows(checkpoint, layout, expert)
    for name, rows in own.items():
        whole = name.replace(EXTRA, "")
        if whole in tensors:
            tensors[whole] = tensors[whole][: -len(rows)].clone()
    return tensors | own


def made_head(artefact: Artefact) -> str | None:
    """Return the digest of the head in an `expert` artefact, None where the expert's checkpoint has it."""
    made: dict[str, Any] | None = artefact.manifest["files"].get(HEAD)
    return None if made is None else str(made["sha256"])


def own_rows(checkpoint: Checkpoint, layout: Layout, expert: str) -> dict[str, torch.Tensor]:
    """Return the embedding rows of one expert's own tokens, `(tokens, width)` each, as its head calls them."""
    return {
        name: checkpoint.tensor(stored)[first : first + rows].clone()
        for name, (stored, first, rows) in layout.extra.get(expert, {}).items()
    }


def read_split(artefact: Artefact, split: str) -> Split:
    """Return one split out of an `expert` artefact."""
    return kind_of(artefact.read_json("expert.json")["kind"]).read_split(artefact.path, split)


class StoredWeights:
    """Encoder weights in an artefact's safetensors files, read one tensor at a time by canonical name."""

    def __init__(self, artefact: Artefact) -> None:
        self._place = mapped(sorted(artefact.path.glob("*.safetensors")))

    @classmethod
    def of(cls, folder: Path) -> Self:
        """Return those in the files of a folder that is no artefact yet."""
        found = cls.__new__(cls)
        found._place = mapped(sorted(folder.glob("*.safetensors")))
        return found

    def __call__(self, name: str) -> torch.Tensor:
        """Return one tensor in its stored dtype."""
        return self._place[name].tensor(name)

    def state(self) -> dict[str, torch.Tensor]:
        """Return every tensor."""
        return {name: self(name) for name in self._place}
