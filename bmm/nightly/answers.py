"""What a published model answers on the rows of a merge's tasks, by its own heads: the gate's view of two models.

Both the new model and the champion are measured as they were published, encoder and heads out of their folders, so
that what passes the gate is what will be used. Answers are kept, so the champion of many nights runs once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bmm.checkpoint.canonical import canonical_names
from bmm.checkpoint.reader import Checkpoint
from bmm.checkpoint.vocabulary import EXTRA
from bmm.errors import CheckpointError
from bmm.evaluation.metrics import Measured
from bmm.evaluation.model import TaskModel
from bmm.evaluation.vocabulary import extend
from bmm.kinds.registry import kind_of
from bmm.kinds.settings import asking, reading
from bmm.prediction import Panel, read_split
from bmm.progress import progress
from bmm.recipe import Recipe
from bmm.sources import Expert, Inputs
from bmm.stages.evaluate import open_panel
from bmm.stages.request import Result, Work
from bmm.stages.setup import Setup
from bmm.store import Draft


@dataclass(frozen=True)
class Published:
    """A model as it was published: what it is called, the digest of its files, and what says where they lie.

    `folder` is called once, and only if the model has to answer something for the first time.
    """

    name: str
    digest: str
    folder: Callable[[], Path]


class TestRows:
    """The test rows of a merge's tasks, and what models answer on them.

    Args:
        work: the way to the store.
        recipe: the merge's.
        inputs: the merge's.
        results: of its first stage, at least.
    """

    __test__ = False

    def __init__(self, work: Work, recipe: Recipe, inputs: Inputs, results: Mapping[str, Result]) -> None:
        self._work = work
        self._inputs = inputs
        self._results = results
        opened: tuple[Setup, Panel] = open_panel(work, recipe, inputs, results)
        self._setup, self._panel = opened
        self._batch_size = recipe.evaluation.batch_size

    def answers(self, model: Published, tasks: Sequence[str]) -> dict[str, Measured]:
        """Return by task what a model's answers are worth; it must have these tasks.

        Raises:
            CheckpointError: the model lacks a tensor, or cannot be loaded as what it was published as.
            FloatingPointError: an answer is not finite.
        """
        found = {}
        experts = {expert.name: expert for expert in self._inputs.experts}
        folder = cache(model.folder)
        with progress(f"{model.name} on test", sum(self._panel.rows(task, "test") for task in tasks)) as bar:
            for task in tasks:
                artefact = self._work.read(self._results["experts"].reference("experts", task))
                split = read_split(artefact, "test")

                def make(draft: Draft, task: str = task, split: Any = split) -> None:
                    loaded = self._load(model.name, folder(), experts[task])
                    answers = loaded.logits(loaded.prepare(split.rows), bar)
                    save_file({"logits": answers}, draft.path / "logits.safetensors")

                inputs = {
                    "model": model.digest,
                    "task": task,
                    "reading": reading(experts[task].task),
                    "asking": asking(experts[task].task),
                    "rows": split.digest,
                    "batch_size": self._batch_size,
                }
                kept = self._work.read(self._work.obtain("answers", inputs, make))
                found[task] = self._panel.measured(task, "test", load_file(kept.file("logits.safetensors"))["logits"])
        return found

    def _load(self, name: str, folder: Path, expert: Expert) -> TaskModel:
        """Load a published model with one of its heads."""
        kind = kind_of(expert.task["kind"])
        head_file = folder / "heads" / f"{expert.name}.safetensors"
        with Checkpoint.open(folder) as checkpoint:
            config, head = checkpoint.config, {}
            if head_file.is_file():
                with safe_open(head_file, framework="pt") as handle:
                    config = json.loads((handle.metadata() or {})["config"])
                head = load_file(head_file)
            own = folder / "heads" / expert.name
            said = {**reading(expert.task), **asking(expert.task)}
            loaded = kind.build(config, own if own.is_dir() else folder, said, self._batch_size, expert.name)
            more = {key: len(rows) for key, rows in head.items() if key.rpartition(".")[2].startswith(EXTRA)}
            extend(loaded.module, more)
            loaded.load_head(head)
            layout = self._setup.layout
            names, _ = canonical_names(checkpoint, layout.prefix, layout.tied)
            wanted = [one for one in loaded.encoder_names() if one in names]
            if not wanted:
                raise CheckpointError(
                    f"{name} is no model of this base's architecture, so the two cannot be compared; "
                    "promote the new one by hand with `bmm promote`"
                )
            loaded.load_encoder({one: checkpoint.tensor(names[one]) for one in wanted})
        return loaded
