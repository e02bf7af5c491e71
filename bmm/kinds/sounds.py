"""Rows of sounds: decoded, known by their samples, and heard at a model's rate.

What a model reads of them is `bmm.kinds.sound_features`. Nothing is unpickled, and nothing decodes but libsndfile, from
a list of formats.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray

from bmm.errors import DataError, one_line
from bmm.evaluation.data import Columns
from bmm.kinds.files import file_bytes

_FORMATS = frozenset({"WAV", "WAVEX", "FLAC", "OGG", "MP3", "AIFF", "AU", "CAF", "RF64", "W64"})
# A file of a few kilobytes can hold hours of silence.
_MOST_SAMPLES = 2**28


@dataclass(frozen=True)
class SoundRow:
    """One example: a sound, by the SHA-256 of its samples and as the bytes of its file, and its class id.

    `frames` is the number of samples in a channel, and `rate` that of samples a second.
    """

    samples: str
    label: int
    frames: int
    rate: int
    data: bytes = b""

    @property
    def identity(self) -> str:
        """SHA-256 of rate, channels and samples, whatever file format they came in."""
        return self.samples

    @property
    def excerpt(self) -> str:
        """The beginning of the digest."""
        return f"sound {self.samples[:12]}"

    def document(self) -> dict[str, Any]:
        """Return the row as plain JSON values."""
        return {"audio": self.samples, "label": self.label, "frames": self.frames, "rate": self.rate}

    def heard(self, rate: int, max_seconds: float) -> NDArray[np.float32]:
        """Return the sound in one channel, `(samples,)` at a rate in Hz, cut to some seconds."""
        sound, own = _decode(self.data)
        sound = sound[: math.ceil(max_seconds * own)].mean(axis=1)
        return _resampled(sound, own, rate)[: math.ceil(max_seconds * rate)]

    def length(self, rate: int, max_seconds: float) -> int:
        """Return how many samples `heard` returns, without decoding any."""
        frames = min(self.frames, math.ceil(max_seconds * self.rate))
        return min(-(-frames * rate // self.rate), math.ceil(max_seconds * rate))

    @classmethod
    def of(cls, data: bytes, label: int) -> SoundRow:
        """Return the row of a file's bytes.

        Raises:
            OSError, ValueError, RuntimeError: they cannot be decoded.
        """
        sound, rate = _decode(data)
        return cls(digest_samples(sound, rate), label, len(sound), rate, data)

    @classmethod
    def silent(cls, rate: int) -> SoundRow:
        """Return a row of one second in which nothing is heard."""
        file = io.BytesIO()
        soundfile.write(file, np.zeros(rate, np.float32), rate, format="WAV")
        return cls.of(file.getvalue(), 0)


def digest_samples(sound: NDArray[np.float32], rate: int) -> str:
    """Return the SHA-256 of a sound `(samples, channels)` and its rate in Hz."""
    head = f"{rate}:{sound.shape[0]}x{sound.shape[1]}:".encode()
    return hashlib.sha256(head + np.ascontiguousarray(sound, dtype="<f4").tobytes()).hexdigest()


def decoded_sounds(columns: Columns, labels: Sequence[int], folder: Path) -> tuple[SoundRow, ...]:
    """Return the rows of the column `audio` with their class ids, each sound decoded once to see that it can be.

    A value is a sound file as `datasets` holds it, or a path; paths are relative to `folder`.

    Raises:
        DataError: a row without a sound, a file that is not there, or one that cannot be decoded.
    """
    rows = []
    for number, value, label in zip(columns.numbers, columns.values["audio"], labels, strict=True):
        spot = f"{columns.spot}: row {number}"
        data = file_bytes(value, "sound", columns.names["audio"], folder, spot)
        try:
            rows.append(SoundRow.of(data, label))
        except (OSError, ValueError, RuntimeError) as error:
            raise DataError(f"{spot} has a sound that cannot be decoded: {one_line(error)}; replace it") from None
    return tuple(rows)


def _decode(data: bytes) -> tuple[NDArray[np.float32], int]:
    """Return the samples `(samples, channels)` of a file, within -1 and 1, and its rate in Hz."""
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        if file.format not in _FORMATS:
            raise ValueError(f"its format is {file.format}, not one of {', '.join(sorted(_FORMATS))}")
        if file.frames * file.channels > _MOST_SAMPLES:
            raise ValueError(f"it has {file.frames * file.channels} samples, more than {_MOST_SAMPLES}")
        sound: NDArray[np.float32] = file.read(dtype="float32", always_2d=True)
        rate = int(file.samplerate)
    if not len(sound):
        raise ValueError("it is empty")
    if not np.isfinite(sound).all():
        raise ValueError("not every sample is a finite number")
    return sound, rate


def _resampled(sound: NDArray[np.float32], own: int, rate: int) -> NDArray[np.float32]:
    """Return a sound `(samples,)` at another rate, through a polyphase filter."""
    if own == rate:
        return sound
    from scipy.signal import resample_poly

    common = math.gcd(own, rate)
    found: NDArray[np.float32] = resample_poly(sound, rate // common, own // common)
    return found.astype(np.float32, copy=False)
