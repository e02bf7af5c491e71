"""Text classification: a text or a pair of texts a row, one class out of a fixed set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from bmm.checkpoint.architecture import Architecture
from bmm.evaluation.data import Split, read_columns
from bmm.evaluation.labels import class_ids
from bmm.evaluation.model import TaskModel, build_module
from bmm.evaluation.scores import CLASSIFICATION
from bmm.kinds.interface import Kind
from bmm.kinds.settings import SplitSource, TextClassification
from bmm.kinds.texts import TextReader, TextRow, probe_tokens, text_rows


class TextClassificationKind(Kind):
    """`AutoModelForSequenceClassification` with a tokenizer."""

    name = "text-classification"
    architecture = Architecture("AutoModelForSequenceClassification", "text classifier")
    metrics = CLASSIFICATION

    @override
    def load_split(
        self, source: SplitSource, task: TextClassification, labels: Sequence[str], folder: Path, where: str
    ) -> Split:
        """Read one split: texts, checked, and their class ids."""
        wanted = {"text": task.text, "text_pair": task.text_pair, "label": task.label if source.labelled else None}
        columns = read_columns(source, wanted, folder, where)
        ids = class_ids(columns, labels, labelled=source.labelled)
        return Split(where, text_rows(columns, ids))

    @override
    def row(self, value: dict[str, Any]) -> TextRow:
        """Make a row of its document."""
        return TextRow(text=value["text"], text_pair=value["text_pair"], label=value["label"])

    @override
    def build(
        self, config: Mapping[str, Any], folder: Path, reading: Mapping[str, Any], batch_size: int, task: str
    ) -> TaskModel:
        """Build a classifier with its tokenizer; texts are cut at `max_length` tokens."""
        module = build_module(config, self.architecture, task)
        model = TaskModel(task, module, self.architecture.prefix(dict(config)), batch_size)
        model.reader = TextReader(folder, reading["max_length"], module, model.encoder, task)
        return model

    @override
    def probe(self, model: TaskModel) -> dict[str, torch.Tensor]:
        """Return a few tokens."""
        return probe_tokens()
