"""Text regression: a text or a pair of texts a row, and one number (GLUE's STS-B)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from typing_extensions import override

from bmm.checkpoint.architecture import Architecture
from bmm.checkpoint.reader import Checkpoint
from bmm.errors import CheckpointError, DataError
from bmm.evaluation.data import Split, read_columns
from bmm.evaluation.scores import REGRESSION
from bmm.kinds.settings import SplitSource
from bmm.kinds.text_classification import TextClassificationKind
from bmm.kinds.texts import text_rows


class TextRegressionKind(TextClassificationKind):
    """`AutoModelForSequenceClassification` with a tokenizer and one output."""

    name = "text-regression"
    architecture = Architecture("AutoModelForSequenceClassification", "text regressor")
    metrics = REGRESSION
    classes = False

    @override
    def labels(self, checkpoint: Checkpoint, task: Any) -> tuple[str, ...]:
        """Return no names, of a model with one output."""
        if len(super().labels(checkpoint, task)) != 1:
            raise CheckpointError(
                f"{checkpoint.path / 'config.json'}: a model for text regression has one output (num_labels 1); "
                "name such a model or another task.kind"
            )
        return ()

    @override
    def load_split(self, source: SplitSource, task: Any, labels: Sequence[str], folder: Path, where: str) -> Split:
        """Read one split: texts, checked, and their numbers."""
        wanted = {"text": task.text, "text_pair": task.text_pair, "label": task.label}
        columns = read_columns(source, wanted, folder, where)
        numbers = []
        for number, value in zip(columns.numbers, columns.values["label"], strict=True):
            try:
                found = float(value)
            except (TypeError, ValueError):
                found = math.nan
            if not math.isfinite(found):
                raise DataError(
                    f"{columns.spot}: row {number} has {value!r} in column '{columns.names['label']}' where a number "
                    "belongs; correct or remove the row"
                )
            numbers.append(found)
        return Split(where, text_rows(columns, numbers))
