"""One expert on the disk: an ordinary Hugging Face checkpoint, fine-tuned from the base, with its record.

`expert.json` beside the weights holds the digest of everything that determines them, so that a finished expert is
reused and a changed setting trains again. The training itself is in `bmm.zoo.training`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bmm.digest import digest_files, digest_json
from bmm.disk import explained
from bmm.progress import Bar, progress
from bmm.zoo.learners import Classifier, Training
from bmm.zoo.sets import Row
from bmm.zoo.splits import TaskRows
from bmm.zoo.staging import publish, scratch
from bmm.zoo.training import fine_tune, quiet_transformers

EXPERT_FILE = "expert.json"
TRAINING_VERSION = 1
MEASURE_BATCH = 64
BASE_FILES = ("config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json")


def base_digest(base: Path) -> str:
    """Return one digest of the base's weights, configuration, tokenizer and processor files, for those that exist."""
    return digest_files([(name, base / name) for name in BASE_FILES if (base / name).is_file()])


def expert_key(base: str, rows: str, settings: Training) -> str:
    """Return the digest of all that determines an expert: base, rows, settings, the loop's version."""
    return digest_json({"version": TRAINING_VERSION, "base": base, "rows": rows, "settings": asdict(settings)})


def read_expert(folder: Path, key: str) -> dict[str, Any] | None:
    """Return `expert.json` of a finished expert with this `key`, or None where it must be trained."""
    try:
        document = json.loads((folder / EXPERT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(document, dict) or document.get("key") != key:
        return None
    return document if files_intact(folder, document.get("files")) else None


def file_sizes(folder: Path) -> dict[str, int]:
    """Return the size in bytes of every file directly in `folder`, `expert.json` left out."""
    return {
        path.name: path.stat().st_size
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != EXPERT_FILE
    }


def files_intact(folder: Path, sizes: Any) -> bool:
    """Return whether every file of `sizes` lies in `folder` with its size."""
    if not isinstance(sizes, dict) or not sizes:
        return False
    found = file_sizes(folder) if folder.is_dir() else {}
    return all(found.get(name) == size for name, size in sizes.items())


def train_expert(
    name: str,
    base: Path,
    rows: TaskRows,
    folder: Path,
    settings: Training,
    *,
    measure: bool = False,
    card: str | None = None,
) -> dict[str, Any]:
    """Fine-tune `base` on `rows.training` and write the checkpoint to `folder`; return its `expert.json`.

    A finished expert with the same key is returned as it is. With `measure`, the document also holds
    accuracies on `rows.validation` and `rows.test` of the expert and of the base encoder (pooler included)
    under the expert's classifier. `card` becomes `README.md`.

    Raises:
        TrainingError: the loss stopped being finite.
        OutputError: `folder` cannot be written.
    """
    key = expert_key(base_digest(base), rows.digest(), settings)
    finished = read_expert(folder, key)
    if finished is not None and (not measure or "accuracy" in finished):
        return finished
    with explained(folder), scratch(folder.parent, folder.name) as staging:
        started = time.monotonic()
        classifier = settings.classifier(base, rows.labels)
        fine_tune(name, classifier, rows.training, rows.labels, settings)
        seconds = time.monotonic() - started
        classifier.save(staging)
        if card is not None:
            (staging / "README.md").write_text(card, encoding="utf-8")
        document: dict[str, Any] = {
            "key": key,
            "set": name,
            "labels": list(rows.labels),
            "settings": asdict(settings),
            "training_rows": len(rows.training),
            "seconds": round(seconds, 2),
            "files": file_sizes(staging),
        }
        if measure:
            document["accuracy"] = _measure(classifier, base, rows)
        (staging / EXPERT_FILE).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        publish(staging, folder)
    return document


def _accuracy(classifier: Classifier, rows: Sequence[Row], bar: Bar) -> float:
    import torch

    correct, names = 0, classifier.network.config.id2label
    with torch.inference_mode():
        for start in range(0, len(rows), MEASURE_BATCH):
            batch = rows[start : start + MEASURE_BATCH]
            inputs = classifier.encode([content for content, _ in batch])
            chosen = classifier.network(**inputs).logits.argmax(dim=-1).tolist()
            correct += sum(names[index] == label for index, (_, label) in zip(chosen, batch, strict=True))
            bar.advance(len(batch))
    return correct / len(rows)


def _measure(classifier: Classifier, base: Path, rows: TaskRows) -> dict[str, dict[str, float]]:
    """Return accuracies of the expert and of the base encoder under the expert's classifier, by split.

    The classifier's encoder is the base's afterwards.
    """
    from transformers import AutoModel

    parts = {"validation": rows.validation, "test": rows.test}
    encoder = classifier.network.base_model
    with progress("measuring", 2 * sum(len(part) for part in parts.values())) as bar:
        expert = {part: _accuracy(classifier, part_rows, bar) for part, part_rows in parts.items()}
        with quiet_transformers():
            plain_encoder = AutoModel.from_pretrained(base, local_files_only=True).state_dict()
        encoder.load_state_dict(plain_encoder)
        plain = {part: _accuracy(classifier, part_rows, bar) for part, part_rows in parts.items()}
    return {"expert": expert, "base": plain}
