"""What a text expert and an image expert do differently: their settings, opening the base, reading rows, saving.

The loop that trains either is in `bmm.zoo.training`. torch and transformers are imported only where a model is opened.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bmm.zoo.pictures import Picture
from bmm.zoo.sets import Content
from bmm.zoo.training import TrainingSettings, quiet_transformers


class Classifier(Protocol):
    """A Hugging Face classifier with what it needs to read rows."""

    network: Any

    def encode(self, contents: Sequence[Content]) -> Mapping[str, Any]:
        """Return the network's inputs for some contents."""
        ...

    def save(self, folder: Path) -> None:
        """Write the checkpoint with its tokenizer or image processor."""
        ...


@dataclass(frozen=True)
class TextTraining(TrainingSettings):
    """One text expert's run.

    `max_length` is in tokens, longer texts are cut. Word embeddings keep the base's values where
    `frozen_word_embeddings`: half of the parameters of a small encoder, of which a short run touches a few rows only.
    """

    steps: int = 140
    batch_size: int = 16
    learning_rate: float = 2e-4
    head_learning_rate: float = 5e-3
    warmup_steps: int = 16
    max_length: int = 32
    frozen_word_embeddings: bool = True

    @property
    def note(self) -> str:
        """What a model card says of the rows."""
        return f" of at most {self.max_length} tokens"

    def classifier(self, base: Path, labels: Sequence[str]) -> Classifier:
        """Return the base with a new, seeded head for `labels`."""
        return TextClassifier(base, labels, self)


@dataclass(frozen=True)
class ImageTraining(TrainingSettings):
    """One image expert's run; the side of the pictures is what the base's image processor says."""

    steps: int = 90
    batch_size: int = 32
    learning_rate: float = 5e-5
    head_learning_rate: float = 3e-3
    warmup_steps: int = 8

    @property
    def note(self) -> str:
        """What a model card says of the rows."""
        return ""

    def classifier(self, base: Path, labels: Sequence[str]) -> Classifier:
        """Return the base with a new, seeded head for `labels`."""
        return ImageClassifier(base, labels, self)


Training = TextTraining | ImageTraining


class TextClassifier:
    """A sequence classifier and its tokenizer."""

    def __init__(self, base: Path, labels: Sequence[str], settings: TextTraining) -> None:
        """Open the base with a new head."""
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
        self.max_length = settings.max_length
        self.network = _opened(AutoModelForSequenceClassification, base, labels, settings)
        if settings.frozen_word_embeddings:
            self.network.get_input_embeddings().requires_grad_(False)

    def encode(self, contents: Sequence[Content]) -> Mapping[str, Any]:
        """Return token ids and masks, (rows, tokens) each."""
        encoded: Mapping[str, Any] = self.tokenizer(
            list(contents), truncation=True, max_length=self.max_length, padding=True, return_tensors="pt"
        )
        return encoded

    def save(self, folder: Path) -> None:
        """Write the checkpoint with its tokenizer."""
        with quiet_transformers():
            self.network.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)


class ImageClassifier:
    """An image classifier and its image processor."""

    def __init__(self, base: Path, labels: Sequence[str], settings: ImageTraining) -> None:
        """Open the base with a new head."""
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        with quiet_transformers():
            # The one on Pillow and NumPy, whatever else is installed: every machine makes the same pixels.
            self.processor = AutoImageProcessor.from_pretrained(base, local_files_only=True, backend="pil")
        self.network = _opened(AutoModelForImageClassification, base, labels, settings)

    def encode(self, contents: Sequence[Content]) -> Mapping[str, Any]:
        """Return pixel values, (rows, 3, side, side)."""
        images = [content.image().convert("RGB") for content in contents if isinstance(content, Picture)]
        encoded: Mapping[str, Any] = self.processor(images=images, return_tensors="pt")
        return encoded

    def save(self, folder: Path) -> None:
        """Write the checkpoint with its image processor."""
        with quiet_transformers():
            self.network.save_pretrained(folder)
            self.processor.save_pretrained(folder)


def _opened(auto: Any, base: Path, labels: Sequence[str], settings: TrainingSettings) -> Any:
    import torch

    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(settings.seed)
        return auto.from_pretrained(
            base,
            local_files_only=True,
            id2label=dict(enumerate(labels)),
            label2id={label: index for index, label in enumerate(labels)},
            hidden_dropout_prob=settings.dropout,
            attention_probs_dropout_prob=settings.dropout,
            dtype=torch.float32,
        )
