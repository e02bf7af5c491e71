"""What a model reads of sounds: the features that its own feature extractor makes of them, batch by batch.

The rows themselves are `bmm.kinds.sounds`; what becomes of the answers is for the kinds that use these to say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor

from bmm.errors import CheckpointError, DataError, one_line
from bmm.evaluation.tokens import quiet_transformers
from bmm.kinds.files import processor_folder
from bmm.kinds.settings import PROCESSOR
from bmm.kinds.sounds import SoundRow

# Batches of a split are kept up to this size, so that a search does not decode and transform in every trial.
_KEPT_BYTES = 256 * 2**20


class SoundReader:
    """Makes features of sounds as one expert was trained to hear them.

    Args:
        folder: where the feature extractor's file is.
        config: of the task's model.
        task: the expert's name, for messages.
        max_seconds: longer sounds are cut.
        said: what the file says, where the expert has none of its own and hears as the base does.

    Raises:
        CheckpointError: the folder has no feature extractor, or none that transformers has.
    """

    def __init__(
        self, folder: Path, config: Any, task: str, max_seconds: float, said: Mapping[str, Any] | None = None
    ) -> None:
        with processor_folder(folder, said) as place:
            self._extractor = load_extractor(place)
        self._folder = folder
        self._config = config
        self._task = task
        self._max_seconds = max_seconds

    @property
    def rate(self) -> int:
        """Samples a second that the model was trained on."""
        return int(self._extractor.sampling_rate)

    def prepare(self, rows: Sequence[SoundRow]) -> PreparedSounds:
        """Return the rows, to be decoded and transformed batch by batch.

        Raises:
            CheckpointError: the feature extractor makes features that the model does not take.
            DataError: a sound is too short for the model.
        """
        prepared = PreparedSounds(tuple(rows), self._extractor, self._task, self._max_seconds)
        if rows:
            self._check_size(prepared.features(rows[:1]))
            self._check_length(rows, prepared.lengths)
        return prepared

    def _check_size(self, features: Mapping[str, Tensor]) -> None:
        found = tuple(next(iter(features.values())).shape[1:])
        expected = expected_size(self._config)
        if expected is not None and found != expected:
            raise CheckpointError(
                f"{self._task}: {self._folder / PROCESSOR} makes features of {' x '.join(map(str, found))}, but the "
                f"model takes {' x '.join(map(str, expected))}; correct it"
            )

    def _check_length(self, rows: Sequence[SoundRow], lengths: Sequence[int]) -> None:
        shortest = _shortest(self._config)
        for row, length in zip(rows, lengths, strict=True):
            if length < shortest:
                raise DataError(
                    f"{self._task}: the {row.excerpt} has {length} samples at {self.rate} Hz, but the model needs "
                    f"{shortest}; remove the row or raise task.max_seconds"
                )


class PreparedSounds:
    """Sounds on their way into a model; small splits are transformed once and kept.

    A batch holds sounds of one length, where a feature extractor makes more of longer ones (Wav2Vec2): nothing is
    padded, so that no answer depends on the other rows of its batch.
    """

    def __init__(self, rows: tuple[SoundRow, ...], extractor: Any, task: str, max_seconds: float) -> None:
        self._rows = rows
        self._extractor = extractor
        self._task = task
        self._max_seconds = max_seconds
        self._kept: dict[tuple[int, int], dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return len(self._rows)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Each row's number of samples, as the feature extractor gets them."""
        return tuple(row.length(int(self._extractor.sampling_rate), self._max_seconds) for row in self._rows)

    @cached_property
    def order(self) -> Sequence[int]:
        """Rows by their length, where that matters."""
        if self._one_size:
            return range(len(self._rows))
        return sorted(range(len(self._rows)), key=lambda index: self.lengths[index])

    def batches(self, batch_size: int) -> Iterator[dict[str, Tensor]]:
        """Yield the model's features, rows first, float32."""
        start = 0
        while start < len(self._rows):
            some = list(self.order[start : start + batch_size])
            if not self._one_size:
                some = [index for index in some if self.lengths[index] == self.lengths[some[0]]]
            place = (batch_size, start)
            found = self._kept.get(place)
            if found is None:
                found = self.features([self._rows[index] for index in some])
                if sum(tensor.nbytes for tensor in found.values()) * len(self._rows) <= _KEPT_BYTES * len(some):
                    self._kept[place] = found
            yield dict(found)
            start += len(some)

    def features(self, rows: Sequence[SoundRow]) -> dict[str, Tensor]:
        """Return what the feature extractor makes of sounds of one length, rows first, float32.

        `attention_mask` is there only where it says that something is padding.

        Raises:
            DataError: it cannot take them.
        """
        return self._features([self._heard(row) for row in rows])

    def _features(self, sounds: list[NDArray[np.float32]]) -> dict[str, Tensor]:
        rate = self._extractor.sampling_rate
        name = self._extractor.model_input_names[0]
        try:
            processed = self._extractor(sounds, sampling_rate=rate, return_tensors="pt")
            found = {name: processed[name].to(torch.float32)}
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{self._task}: the feature extractor cannot take the sounds: {one_line(error)}") from None
        mask = processed.get("attention_mask")
        if mask is not None and not bool(mask.all()):
            found["attention_mask"] = mask
        return found

    def _heard(self, row: SoundRow) -> NDArray[np.float32]:
        return row.heard(int(self._extractor.sampling_rate), self._max_seconds)

    @cached_property
    def _one_size(self) -> bool:
        """Whether the feature extractor makes as much of a short sound as of a long one (Whisper)."""
        rate = int(self._extractor.sampling_rate)
        sizes = {
            tuple(tensor.shape)
            for seconds in (1, 2)
            for tensor in list(self._features([np.zeros(seconds * rate, np.float32)]).values())[:1]
        }
        return len(sizes) == 1


def load_extractor(folder: Path) -> Any:
    """Return the feature extractor in a local folder; nothing is fetched and no code in it is run.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    if not (folder / PROCESSOR).is_file():
        raise CheckpointError(
            f"{folder} has no {PROCESSOR}; save the feature extractor that the model was trained with there"
        )
    try:
        with quiet_transformers():
            found = transformers.AutoFeatureExtractor.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
    except Exception as error:
        raise CheckpointError(f"the feature extractor in {folder} cannot be read: {one_line(error)}") from error
    if not isinstance(found, transformers.SequenceFeatureExtractor):
        raise CheckpointError(f"{folder / PROCESSOR} is no feature extractor of sounds; save the model's own there")
    return found


def expected_size(config: Any) -> tuple[int, int] | None:
    """Return the shape of the only features that a model takes of a row, or None where it takes any length.

    Whisper `(mel bins, frames)`, the spectrogram transformer `(frames, mel bins)`.
    """
    positions = getattr(config, "max_source_positions", None)
    if config.model_type == "whisper" and positions is not None:
        return int(config.num_mel_bins), 2 * int(positions)
    if config.model_type == "audio-spectrogram-transformer":
        return int(config.max_length), int(config.num_mel_bins)
    return None


def _shortest(config: Any) -> int:
    """Return the least number of samples of which a model's convolutions over a waveform make a frame."""
    frames = 1
    layers = zip(getattr(config, "conv_kernel", ()), getattr(config, "conv_stride", ()), strict=False)
    for kernel, stride in reversed(list(layers)):
        frames = (frames - 1) * stride + kernel
    return frames
