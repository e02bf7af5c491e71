"""Rows of images: decoded, known by their pixels, and read by a model's own image processor.

What becomes of the answers is for the kinds that use these to say. Nothing is unpickled, and nothing decodes but
Pillow, from a list of formats.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image, ImageOps
from torch import Tensor

from bmm.errors import CheckpointError, DataError, one_line
from bmm.evaluation.data import Columns
from bmm.evaluation.tokens import quiet_transformers
from bmm.kinds.files import file_bytes, processor_folder
from bmm.kinds.settings import PROCESSOR

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
# Whose values a conversion to 8 bits a channel would cut off.
_TOO_DEEP = ("I", "F")
# Batches of a split are kept up to this size, so that a search does not decode and resize in every trial.
_KEPT_BYTES = 256 * 2**20


@dataclass(frozen=True)
class ImageRow:
    """One example: an image, by the SHA-256 of its pixels and as the bytes of its file, and its class id."""

    pixels: str
    label: int
    data: bytes = b""

    @property
    def identity(self) -> str:
        """SHA-256 of size and pixels in RGB, whatever file format they came in."""
        return self.pixels

    @property
    def excerpt(self) -> str:
        """The beginning of the digest."""
        return f"image {self.pixels[:12]}"

    def document(self) -> dict[str, Any]:
        """Return the row as plain JSON values."""
        return {"image": self.pixels, "label": self.label}

    def decoded(self) -> Image.Image:
        """Return the image in RGB, upright."""
        return _decode(self.data)

    @classmethod
    def grey(cls) -> ImageRow:
        """Return a row whose image says nothing."""
        file = io.BytesIO()
        Image.new("RGB", (64, 64), (128, 128, 128)).save(file, "PNG")
        return cls(digest_pixels(_decode(file.getvalue())), 0, file.getvalue())


def digest_pixels(image: Image.Image) -> str:
    """Return the SHA-256 of an RGB image's width, height and pixels."""
    return hashlib.sha256(f"{image.width}x{image.height}:".encode() + image.tobytes()).hexdigest()


def decoded_images(columns: Columns, labels: Sequence[int], folder: Path) -> tuple[ImageRow, ...]:
    """Return the rows of the column `image` with their class ids, each image decoded once to see that it can be.

    A value is an image as `datasets` holds it, or a path; paths are relative to `folder`.

    Raises:
        DataError: a row without an image, a file that is not there, or one that cannot be decoded.
    """
    rows = []
    for number, value, label in zip(columns.numbers, columns.values["image"], labels, strict=True):
        spot = f"{columns.spot}: row {number}"
        data = file_bytes(value, "image", columns.names["image"], folder, spot)
        try:
            pixels = digest_pixels(_decode(data))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{spot} has an image that cannot be decoded: {one_line(error)}; replace it") from None
        rows.append(ImageRow(pixels, label, data))
    return tuple(rows)


class ImageReader:
    """Makes pixel values of images as one expert was trained to read them.

    Args:
        folder: where the image processor's file is.
        config: of the task's model.
        task: the expert's name, for messages.
        said: what the file says, where the expert has none of its own and reads images as the base does.

    Raises:
        CheckpointError: the folder has no image processor, or none that transformers has.
    """

    def __init__(self, folder: Path, config: Any, task: str, said: Mapping[str, Any] | None = None) -> None:
        with processor_folder(folder, said) as place:
            self._processor = load_processor(place)
        self._folder = folder
        self._config = config
        self._task = task

    def prepare(self, rows: Sequence[ImageRow]) -> PreparedImages:
        """Return the rows, to be decoded and processed batch by batch.

        Raises:
            CheckpointError: the image processor gives images of a size that the model does not take.
        """
        prepared = PreparedImages(tuple(rows), self._processor, self._task)
        if rows:
            height, width = prepared.pixel_values(rows[:1]).shape[-2:]
            expected = _expected_size(self._config)
            if expected is not None and expected != (height, width):
                raise CheckpointError(
                    f"{self._task}: {self._folder / PROCESSOR} makes images of {height} x {width}, but the model "
                    f"takes {expected[0]} x {expected[1]}; correct size and crop_size in it"
                )
        return prepared


class PreparedImages:
    """Images on their way into a model; small splits are processed once and kept."""

    def __init__(self, rows: tuple[ImageRow, ...], processor: Any, task: str) -> None:
        self._rows = rows
        self._processor = processor
        self._task = task
        self._kept: dict[tuple[int, int], Tensor] = {}

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def order(self) -> range:
        """Rows as they were given: all are of one size."""
        return range(len(self._rows))

    def batches(self, batch_size: int) -> Iterator[dict[str, Tensor]]:
        """Yield `pixel_values`, (rows, channels, height, width) float32."""
        for start in range(0, len(self._rows), batch_size):
            place = (batch_size, start)
            values = self._kept.get(place)
            if values is None:
                values = self.pixel_values(self._rows[start : start + batch_size])
                if values[0].nbytes * len(self._rows) <= _KEPT_BYTES:
                    self._kept[place] = values
            yield {"pixel_values": values}

    def pixel_values(self, rows: Sequence[ImageRow]) -> Tensor:
        """Return what the image processor makes of some rows, (rows, channels, height, width) float32.

        Raises:
            DataError: it cannot take them.
        """
        try:
            processed = self._processor(images=[row.decoded() for row in rows], return_tensors="pt")
            values: Tensor = processed["pixel_values"].to(torch.float32)
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{self._task}: the image processor cannot take the images: {one_line(error)}") from error
        return values


def load_processor(folder: Path) -> Any:
    """Return the image processor in a local folder; nothing is fetched and no code in it is run.

    Always the one on Pillow and NumPy, whatever else is installed, so that every machine makes the same pixels.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    if not (folder / PROCESSOR).is_file():
        raise CheckpointError(
            f"{folder} has no {PROCESSOR}; save the image processor that the model was trained with there"
        )
    try:
        with quiet_transformers():
            return transformers.AutoImageProcessor.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False, backend="pil"
            )
    except Exception as error:
        raise CheckpointError(f"the image processor in {folder} cannot be read: {one_line(error)}") from error


def _expected_size(config: Any) -> tuple[int, int] | None:
    """Return height and width of the only images that a model takes, or None where it takes any."""
    # These stretch their position embeddings by themselves.
    if config.model_type.startswith(("dinov2", "dinov3")):
        return None
    size = getattr(getattr(config, "vision_config", config), "image_size", None)
    if isinstance(size, int):
        return size, size
    return (int(size[0]), int(size[1])) if isinstance(size, list | tuple) and len(size) == 2 else None


def _decode(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        if image.mode.startswith(_TOO_DEEP):
            raise ValueError(f"it has more than 8 bits a channel (mode {image.mode})")
        # As transformers itself opens images.
        upright: Image.Image = ImageOps.exif_transpose(image).convert("RGB")
        return upright
