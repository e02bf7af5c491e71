"""Pico experts that hear: real checkpoints and real sound files, made in a temporary folder; nothing is trained."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import transformers
from family_checkpoints import CLASSES, EXPERTS, LABELS, SPLITS, move, write_recipe
from numpy.typing import NDArray

RATE = 16_000
ROWS = 10
SECONDS = 0.25

_SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
_WHISPER = {
    "d_model": 16,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 24,
    "vocab_size": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "num_mel_bins": 8,
    "max_source_positions": 50,
    "max_target_positions": 8,
    "classifier_proj_size": 8,
}
_CONVOLUTIONS = {
    "conv_dim": (8, 8),
    "conv_kernel": (10, 8),
    "conv_stride": (40, 8),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 8,
}
_SPECTROGRAM = {"num_mel_bins": 8, "max_length": 20, "patch_size": 4, "frequency_stride": 2, "time_stride": 3}
CONFIGS: dict[str, Callable[[], Any]] = {
    "whisper": lambda: transformers.WhisperConfig(**_WHISPER),
    "wav2vec2": lambda: transformers.Wav2Vec2Config(**_SHAPE, **_CONVOLUTIONS),
    "ast": lambda: transformers.ASTConfig(**_SHAPE, **_SPECTROGRAM),
}
_EXTRACTORS: dict[str, Callable[[], Any]] = {
    "whisper": lambda: transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1),
    "wav2vec2": lambda: transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True),
    "ast": lambda: transformers.ASTFeatureExtractor(num_mel_bins=8, max_length=20),
}


def extractor(family: str) -> Any:
    """Return a feature extractor that fits a family's model here."""
    return _EXTRACTORS[family]()


def sound(seed: int, seconds: float = SECONDS) -> NDArray[np.float32]:
    """Return a tone in noise, `(samples,)` within -1 and 1, of 16 bits."""
    generator = np.random.default_rng(seed)
    time = np.arange(round(seconds * RATE)) / RATE
    tone = 0.5 * np.sin(2 * np.pi * generator.uniform(100, 4000) * time)
    return np.round((tone + generator.uniform(-0.4, 0.4, len(time))) * 2**15).astype(np.float32) / 2**15


def encoded(samples: Any, form: str = "WAV", rate: int = RATE, subtype: str = "PCM_16") -> bytes:
    """Return samples `(frames,)` or `(frames, channels)` as the bytes of a file."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=form, subtype=subtype)
    return file.getvalue()


def build_sounds(folder: Path, family: str, base_class: Any = transformers.AutoModel, **changes: Any) -> Path:
    """Build base, two experts that classify sounds, files of sounds and a recipe; labels are what the experts answer.

    Args:
        folder: where all of it goes.
        family: one of `CONFIGS`.
        base_class: what the base is saved as.
        changes: of the experts' configuration.
    """
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = CONFIGS[family]()
    base = base_class.from_config(config) if hasattr(base_class, "from_config") else base_class(config)
    move(base, 0, by=0.25)
    base.save_pretrained(folder / "base")
    extractor(family).save_pretrained(folder / "base")
    for number, name in enumerate(EXPERTS):
        model = transformers.AutoModelForAudioClassification.from_pretrained(folder / "base", **CLASSES, **changes)
        move(model, number + 1)
        model.eval().save_pretrained(folder / name)
        (folder / "data" / name).mkdir(parents=True)
        for place, split in enumerate(SPLITS):
            lines = []
            for index in range(ROWS):
                # Some of one length, some of others.
                heard = sound(1000 * number + 100 * place + index, SECONDS + 0.05 * (index % 3))
                path = folder / "data" / name / f"{split}-{index}.{'wav' if index % 2 else 'flac'}"
                soundfile.write(path, heard, RATE, subtype="PCM_16")
                row = {"audio": path.relative_to(folder).as_posix(), "label": answer(model, family, heard)}
                lines.append(json.dumps(row) + "\n")
            (folder / "data" / f"{name}-{split}.jsonl").write_text("".join(lines))
    return write_recipe(folder, {"kind": "audio-classification"}, coverage={"minimum": 0.5})


def answer(model: Any, family: str, heard: NDArray[np.float32]) -> str:
    """Return a classifier's answer to one sound, by transformers alone."""
    batch = extractor(family)(heard, sampling_rate=RATE, return_tensors="pt")
    name = model.main_input_name
    with torch.inference_mode():
        return LABELS[int(model.eval()(batch[name]).logits.argmax())]


def rows_of(folder: Path, name: str, split: str = "test") -> list[tuple[NDArray[np.float32], str]]:
    """Return an expert's sounds and labels, as they lie in the folder."""
    lines = (folder / "data" / f"{name}-{split}.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [(soundfile.read(folder / row["audio"], dtype="float32")[0], row["label"]) for row in rows]
