"""Audio classification: a sound a row, one class out of a fixed set."""

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
from bmm.kinds.files import read_files, write_files
from bmm.kinds.interface import Kind
from bmm.kinds.settings import AudioClassification, SplitSource
from bmm.kinds.sound_features import SoundReader, expected_size
from bmm.kinds.sounds import SoundRow, decoded_sounds

_SECOND = 16_000
_FRAMES = 50


class AudioClassificationKind(Kind):
    """`AutoModelForAudioClassification` with a feature extractor."""

    name = "audio-classification"
    architecture = Architecture("AutoModelForAudioClassification", "audio classifier")
    metrics = CLASSIFICATION

    @override
    def load_split(
        self, source: SplitSource, task: AudioClassification, labels: Sequence[str], folder: Path, where: str
    ) -> Split:
        """Read one split: sounds, checked, and their class ids."""
        columns = read_columns(
            source, {"audio": task.audio, "label": task.label if source.labelled else None}, folder, where
        )
        ids = class_ids(columns, labels, labelled=source.labelled)
        return Split(where, decoded_sounds(columns, ids, folder))

    @override
    def row(self, value: dict[str, Any]) -> SoundRow:
        """Make a row, still without its sound, of its document."""
        return SoundRow(value["audio"], value["label"], value["frames"], value["rate"])

    @override
    def write_split(self, split: Split, folder: Path, name: str) -> None:
        """Write rows and, each once, the bytes of their sounds."""
        super().write_split(split, folder, name)
        write_files(split, folder / f"{name}.safetensors")

    @override
    def read_split(self, folder: Path, name: str) -> Split:
        """Read rows with their sounds."""
        return read_files(super().read_split(folder, name), folder / f"{name}.safetensors", "sound")

    @override
    def build(
        self, config: Mapping[str, Any], folder: Path, reading: Mapping[str, Any], batch_size: int, task: str
    ) -> TaskModel:
        """Build a classifier with its feature extractor."""
        module = build_module(config, self.architecture, task)
        reader = SoundReader(folder, module.config, task, reading["max_seconds"], reading.get("processor"))
        return TaskModel(task, module, self.architecture.prefix(dict(config)), batch_size, reader)

    @override
    def probe(self, model: TaskModel) -> dict[str, torch.Tensor]:
        """Return two silent sounds as the feature extractor makes them, or features of the model's size."""
        if isinstance(model.reader, SoundReader):
            silent = SoundRow.silent(model.reader.rate)
            return next(model.batches(model.prepare([silent, silent])))
        config, name = model.module.config, model.module.main_input_name
        if (size := expected_size(config)) is not None:
            return {name: torch.zeros(2, *size)}
        if name == "input_features":
            return {name: torch.zeros(2, _FRAMES, config.feature_projection_input_dim)}
        return {name: torch.zeros(2, _SECOND)}
