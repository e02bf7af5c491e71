"""Fine-tuning one expert from the base: a plain PyTorch loop that leaves an ordinary Hugging Face checkpoint.

`expert.json` beside the weights holds the digest of everything that determines them, so that a finished
expert is reused and a changed setting trains again. torch and transformers are imported only where training
really happens.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bmm.digest import digest_files, digest_json
from bmm.disk import explained
from bmm.errors import BMMError
from bmm.progress import Bar, progress
from bmm.zoo.splits import TaskRows
from bmm.zoo.staging import publish, scratch
from bmm.zoo.text_sets import Row

if TYPE_CHECKING:
    import torch

EXPERT_FILE = "expert.json"
TRAINING_VERSION = 1
MEASURE_BATCH = 64
BASE_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


class TrainingError(BMMError):
    """Fine-tuning went wrong: the loss is not finite."""


@dataclass(frozen=True)
class TrainingSettings:
    """One fine-tuning run.

    `max_length` is in tokens, longer texts are cut. Learning rates are AdamW's peaks: the encoder's (pooler
    included) and the classifier's; both rise linearly over `warmup_steps` and fall linearly to zero. Word
    embeddings keep the base's values where `frozen_word_embeddings`: half of the parameters of a small
    encoder, of which a short run touches a few rows only.
    """

    steps: int = 140
    batch_size: int = 16
    max_length: int = 32
    learning_rate: float = 2e-4
    head_learning_rate: float = 5e-3
    warmup_steps: int = 16
    weight_decay: float = 0.01
    dropout: float = 0.0
    frozen_word_embeddings: bool = True
    seed: int = 0


def base_digest(base: Path) -> str:
    """Return one digest of the base's weights, configuration and tokenizer files, for those that exist."""
    return digest_files([(name, base / name) for name in BASE_FILES if (base / name).is_file()])


def expert_key(base: str, rows: str, settings: TrainingSettings) -> str:
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
    settings: TrainingSettings,
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
        model, tokenizer = _train(name, base, rows, settings)
        seconds = time.monotonic() - started
        with _quiet_transformers():
            model.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
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
            document["accuracy"] = _measure(model, tokenizer, base, rows, settings)
        (staging / EXPERT_FILE).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        publish(staging, folder)
    return document


def batches(rows: Sequence[Row], batch_size: int, steps: int, seed: int) -> Iterator[list[Row]]:
    """Yield `steps` batches of `batch_size` rows, each pass over `rows` in a new seeded order."""
    draw = random.Random(seed)  # noqa: S311 - an order of rows, not a secret
    queue: list[int] = []
    for _ in range(steps):
        while len(queue) < batch_size:
            order = list(range(len(rows)))
            draw.shuffle(order)
            queue += order
        yield [rows[index] for index in queue[:batch_size]]
        del queue[:batch_size]


def learning_rate_factor(step: int, steps: int, warmup_steps: int) -> float:
    """Return the share of the peak rate at `step` (from 0): linear warm-up, then linear decay to zero."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return max(0.0, (steps - step) / max(1, steps - warmup_steps))


def _train(name: str, base: Path, rows: TaskRows, settings: TrainingSettings) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    index_of = {label: index for index, label in enumerate(rows.labels)}
    with torch.random.fork_rng(devices=[]), _quiet_transformers():
        torch.manual_seed(settings.seed)
        model = AutoModelForSequenceClassification.from_pretrained(
            base,
            local_files_only=True,
            id2label=dict(enumerate(rows.labels)),
            label2id=index_of,
            hidden_dropout_prob=settings.dropout,
            attention_probs_dropout_prob=settings.dropout,
            dtype=torch.float32,
        )
        if settings.frozen_word_embeddings:
            model.get_input_embeddings().requires_grad_(False)
        optimizer = torch.optim.AdamW(_parameter_groups(model, settings), fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, settings.steps, settings.warmup_steps)
        )
        model.train()
        with progress(f"training {name}", settings.steps) as bar:
            for batch in batches(rows.training, settings.batch_size, settings.steps, settings.seed):
                encoded = _encode(tokenizer, batch, settings)
                targets = torch.tensor([index_of[label] for _, label in batch])
                loss = torch.nn.functional.cross_entropy(model(**encoded).logits, targets)
                if not torch.isfinite(loss):
                    raise TrainingError(f"the loss of the expert '{name}' is not finite; lower its learning rate")
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                bar.advance()
    model.eval()
    return model, tokenizer


def _parameter_groups(model: Any, settings: TrainingSettings) -> list[dict[str, Any]]:
    """Group parameters by learning rate and weight decay; only matrices decay."""
    prefix = f"{model.base_model_prefix}."
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = settings.learning_rate if name.startswith(prefix) else settings.head_learning_rate
            decay = settings.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": group, "lr": rate, "weight_decay": decay} for (rate, decay), group in groups.items()]


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence the library's own bars and its report that the classifier is new, which here is as intended."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _encode(tokenizer: Any, rows: Sequence[Row], settings: TrainingSettings) -> Any:
    return tokenizer(
        [text for text, _ in rows],
        truncation=True,
        max_length=settings.max_length,
        padding=True,
        return_tensors="pt",
    )


def _accuracy(model: Any, tokenizer: Any, rows: Sequence[Row], settings: TrainingSettings, bar: Bar) -> float:
    import torch

    correct = 0
    with torch.inference_mode():
        for start in range(0, len(rows), MEASURE_BATCH):
            batch = rows[start : start + MEASURE_BATCH]
            chosen = model(**_encode(tokenizer, batch, settings)).logits.argmax(dim=-1).tolist()
            correct += sum(
                model.config.id2label[index] == label for index, (_, label) in zip(chosen, batch, strict=True)
            )
            bar.advance(len(batch))
    return correct / len(rows)


def _measure(
    model: Any, tokenizer: Any, base: Path, rows: TaskRows, settings: TrainingSettings
) -> dict[str, dict[str, float]]:
    """Return accuracies of the expert and of the base encoder under the expert's classifier, by split."""
    from transformers import AutoModel

    parts = {"validation": rows.validation, "test": rows.test}
    with progress("measuring", 2 * sum(len(part) for part in parts.values())) as bar:
        expert = {part: _accuracy(model, tokenizer, part_rows, settings, bar) for part, part_rows in parts.items()}
        with _quiet_transformers():
            encoder = AutoModel.from_pretrained(base, local_files_only=True).state_dict()
        tuned = model.base_model.state_dict()
        model.base_model.load_state_dict(encoder)
        plain = {part: _accuracy(model, tokenizer, part_rows, settings, bar) for part, part_rows in parts.items()}
        model.base_model.load_state_dict(tuned)
    return {"expert": expert, "base": plain}
