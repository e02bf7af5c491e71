"""Rows of sounds: read from every kind of source, known by their samples, kept as bytes, heard at another rate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sounds import RATE, encoded, sound

from bmm.errors import ArtefactDamagedError, DataError
from bmm.evaluation.data import Split, check_disjoint, source_files
from bmm.kinds.audio_classification import AudioClassificationKind
from bmm.kinds.settings import AudioClassification, SplitSource
from bmm.kinds.sounds import SoundRow
from bmm.sources import FILES

KIND = AudioClassificationKind()
LABELS = ["low", "high"]


def row_of(seed: int, label: int = 0, form: str = "WAV", seconds: float = 0.01) -> SoundRow:
    return SoundRow.of(encoded(sound(seed, seconds), form), label)


def load(folder: Path, **source: Any) -> Split:
    task = AudioClassification(kind="audio-classification")
    return KIND.load_split(SplitSource(**source), task, LABELS, folder, "expert birds, test")


def write_rows(folder: Path, count: int = 3) -> list[SoundRow]:
    """Write sounds into one folder a class, and the same rows as JSON lines; return the rows in file order."""
    lines, rows = [], []
    # As the folders' names are sorted.
    for label in (1, 0):
        (folder / "data" / LABELS[label]).mkdir(parents=True)
        for index in range(count):
            rows.append(row_of(10 * label + index, label))
            path = f"data/{LABELS[label]}/{index}.wav"
            (folder / path).write_bytes(rows[-1].data)
            lines.append(json.dumps({"audio": path, "label": LABELS[label]}) + "\n")
    (folder / "rows.jsonl").write_text("".join(lines))
    return rows


def test_folders_columns_of_paths_and_embedded_files_give_the_same_rows(tmp_path: Path) -> None:
    rows = tuple(write_rows(tmp_path))
    (tmp_path / "data" / "high" / "notes.txt").write_text("not a sound")
    assert load(tmp_path, path="audiofolder", data_files="data").rows == rows
    assert load(tmp_path, path="json", data_files="rows.jsonl").rows == rows
    held = [{"bytes": row.data, "path": None} for row in rows]
    table = datasets.Dataset.from_dict({"audio": held, "label": [row.label for row in rows]})
    # As `datasets` itself stores sounds; to make examples of them would take a decoder.
    table = table.cast_column("audio", datasets.Audio()).cast_column("label", datasets.ClassLabel(names=LABELS))
    table.to_parquet(str(tmp_path / "rows.parquet"))
    table.save_to_disk(str(tmp_path / "saved"))
    assert load(tmp_path, path="parquet", data_files="rows.parquet").rows == rows
    assert load(tmp_path, path="./saved").rows == rows
    assert "audio" in FILES
    behind = source_files(SplitSource(path="json", data_files="rows.jsonl"), tmp_path, named="audio")
    assert behind == [tmp_path / "rows.jsonl", *(tmp_path / json.loads(line)["audio"] for line in open_lines(tmp_path))]


def open_lines(folder: Path) -> list[str]:
    return (folder / "rows.jsonl").read_text().splitlines()


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 10**6), st.integers(1, 40))
def test_a_sound_is_known_by_its_samples_in_any_lossless_format(seed: int, length: int) -> None:
    samples = np.random.default_rng(seed).integers(-(2**15), 2**15, (length, 2)).astype(np.int16)
    one = {SoundRow.of(encoded(samples, form), 0).identity for form in ("WAV", "FLAC", "AIFF", "CAF")}
    assert len(one) == 1
    changed = samples.copy()
    changed[0, 0] ^= 1
    assert SoundRow.of(encoded(changed), 0).identity not in one
    assert SoundRow.of(encoded(samples, rate=8000), 0).identity not in one
    assert SoundRow.of(encoded(samples.reshape(-1, 1)), 0).identity not in one


def test_the_same_sound_in_two_splits_is_refused() -> None:
    first, second = Split("c", (row_of(0), row_of(1))), Split("t", (row_of(2), row_of(1, label=1, form="FLAC")))
    with pytest.raises(DataError, match=r"splits calibration and test share 1 row, the first of them \"sound [0-9a-f]"):
        check_disjoint("birds", {"calibration": first, "test": second})


def test_rows_come_back_with_their_bytes_and_each_sound_is_kept_once(tmp_path: Path) -> None:
    split = Split("birds", (row_of(0), row_of(1, 1, "FLAC"), row_of(0, 1)))
    KIND.write_split(split, tmp_path, "test")
    back = KIND.read_split(tmp_path, "test")
    assert back.rows == split.rows
    assert back.digest == split.digest
    file = tmp_path / "test.safetensors"
    assert file.read_bytes().count(split.rows[0].data) == 1
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ArtefactDamagedError, match="the sounds of test are not whole"):
        KIND.read_split(tmp_path, "test")


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        ("gone.wav", "row 1: the sound gone.wav cannot be read: No such file"),
        ("rows.jsonl", "row 1 has a sound that cannot be decoded: Error opening"),
        ("other.voc", "row 1 has a sound that cannot be decoded: its format is VOC, not one of AIFF"),
        ("empty.wav", "row 1 has a sound that cannot be decoded: it is empty"),
        ("broken.wav", "row 1 has a sound that cannot be decoded: not every sample is a finite number"),
        ("", "row 1 has no sound in column 'audio'"),
        (7, "row 1 has a value of type int in column 'audio' where a sound or its path belongs; set task.audio"),
    ],
)
def test_sounds_that_cannot_be_used_are_named(tmp_path: Path, audio: object, message: str) -> None:
    (tmp_path / "other.voc").write_bytes(encoded(sound(0, 0.01), "VOC"))
    (tmp_path / "empty.wav").write_bytes(encoded(np.zeros(0, np.float32)))
    (tmp_path / "broken.wav").write_bytes(encoded(np.array([0.0, np.nan]), subtype="FLOAT"))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"audio": audio, "label": 1}) + "\n")
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path, path="json", data_files="rows.jsonl")
    assert str(caught.value).startswith("expert birds, test (rows.jsonl)")
    assert "\n" not in str(caught.value)


@settings(deadline=None, max_examples=10)
@given(st.sampled_from([8000, 11025, 16000, 22050, 44100, 48000]), st.integers(1, 3000), st.floats(0.001, 0.2))
def test_the_length_of_what_is_heard_is_known_before_it_is_heard(rate: int, frames: int, seconds: float) -> None:
    row = SoundRow.of(encoded(np.zeros(frames, np.float32), rate=rate), 0)
    heard = row.heard(RATE, seconds)
    assert heard.dtype == np.float32
    assert 1 <= len(heard) == row.length(RATE, seconds) <= np.ceil(seconds * RATE)
    assert row.length(RATE, 1) == int(np.ceil(frames * RATE / rate))


def test_a_tone_stays_the_same_tone_in_one_channel_at_another_rate() -> None:
    tone = {rate: np.sin(2 * np.pi * 440 * np.arange(rate // 2) / rate) for rate in (44100, 48000, 8000, RATE)}
    for rate, wave in tone.items():
        # What is heard of two channels is their mean.
        heard = SoundRow.of(encoded(np.stack([wave, np.zeros_like(wave)], axis=1), rate=rate), 0).heard(RATE, 10)
        middle = slice(400, -400)
        np.testing.assert_allclose(heard[middle], 0.5 * tone[RATE][middle], atol=2e-3)
