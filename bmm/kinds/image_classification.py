"""Image classification: an image a row, one class out of a fixed set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from typing_extensions import override

from bmm.checkpoint.architecture import Architecture
from bmm.evaluation.data import Split, read_columns
from bmm.evaluation.labels import class_ids
from bmm.evaluation.model import TaskModel, build_module
from bmm.evaluation.scores import CLASSIFICATION
from bmm.kinds.files import read_files, write_files
from bmm.kinds.images import ImageReader, ImageRow, decoded_images
from bmm.kinds.interface import Kind
from bmm.kinds.settings import ImageClassification, SplitSource

_USUAL_SIZE = 224


class ImageClassificationKind(Kind):
    """`AutoModelForImageClassification` with an image processor."""

    name = "image-classification"
    architecture = Architecture("AutoModelForImageClassification", "image classifier")
    metrics = CLASSIFICATION
    _classes_in_order: ClassVar[bool] = False

    @override
    def load_split(
        self, source: SplitSource, task: ImageClassification, labels: Sequence[str], folder: Path, where: str
    ) -> Split:
        """Read one split: images, checked, and their class ids."""
        columns = read_columns(
            source, {"image": task.image, "label": task.label if source.labelled else None}, folder, where
        )
        ids = class_ids(columns, labels, labelled=source.labelled, in_order=self._classes_in_order)
        return Split(where, decoded_images(columns, ids, folder))

    @override
    def row(self, value: dict[str, Any]) -> ImageRow:
        """Make a row, still without its image, of its document."""
        return ImageRow(pixels=value["image"], label=value["label"])

    @override
    def write_split(self, split: Split, folder: Path, name: str) -> None:
        """Write rows and, each once, the bytes of their images."""
        super().write_split(split, folder, name)
        write_files(split, folder / f"{name}.safetensors")

    @override
    def read_split(self, folder: Path, name: str) -> Split:
        """Read rows with their images."""
        return read_files(super().read_split(folder, name), folder / f"{name}.safetensors", "image")

    @override
    def build(
        self, config: Mapping[str, Any], folder: Path, reading: Mapping[str, Any], batch_size: int, task: str
    ) -> TaskModel:
        """Build a classifier with its image processor."""
        module = build_module(config, self.architecture, task)
        reader = ImageReader(folder, module.config, task, reading.get("processor"))
        return TaskModel(task, module, self.architecture.prefix(dict(config)), batch_size, reader)

    @override
    def probe(self, model: TaskModel) -> dict[str, torch.Tensor]:
        """Return two grey images of the size that the image processor makes, or the model was made for."""
        if model.reader is None:
            config = model.encoder.config
            size = getattr(config, "image_size", None) or _USUAL_SIZE
            height, width = (size, size) if isinstance(size, int) else size
            return {"pixel_values": torch.zeros(2, getattr(config, "num_channels", 3), height, width)}
        grey = ImageRow.grey()
        return next(model.batches(model.prepare([grey, grey])))
