"""The training loop that every expert goes through, whatever it reads: AdamW, seeded batches, two learning rates.

How texts or pictures become a model's inputs is in `bmm.zoo.learners`, what is written to the disk in
`bmm.zoo.experts`. torch and transformers are imported only where training really happens.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from bmm.errors import BMMError
from bmm.progress import progress
from bmm.zoo.sets import Content, Row

if TYPE_CHECKING:
    import torch


class TrainingError(BMMError):
    """Fine-tuning went wrong: the loss is not finite."""


@dataclass(frozen=True)
class TrainingSettings:
    """One fine-tuning run, whatever the model reads.

    Learning rates are AdamW's peaks: the encoder's (pooler included) and the classifier's; both rise linearly over
    `warmup_steps` and fall linearly to zero. `dropout` is the share of hidden values and of attention dropped.
    """

    steps: int
    batch_size: int
    learning_rate: float
    head_learning_rate: float
    warmup_steps: int
    weight_decay: float = 0.01
    dropout: float = 0.0
    seed: int = 0


class Reader(Protocol):
    """A network and how it reads rows; `bmm.zoo.learners` has them."""

    network: Any

    def encode(self, contents: Sequence[Content]) -> Mapping[str, Any]:
        """Return the network's inputs for some contents."""
        ...


def fine_tune(name: str, model: Reader, rows: Sequence[Row], labels: Sequence[str], settings: TrainingSettings) -> None:
    """Train the classifier in place and leave it in evaluation mode; `labels` give the class ids.

    Raises:
        TrainingError: the loss stopped being finite.
    """
    import torch

    index_of = {label: index for index, label in enumerate(labels)}
    network = model.network
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        optimizer = torch.optim.AdamW(_parameter_groups(network, settings), fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, settings.steps, settings.warmup_steps)
        )
        network.train()
        with progress(f"training {name}", settings.steps) as bar:
            for batch in batches(rows, settings.batch_size, settings.steps, settings.seed):
                inputs = model.encode([content for content, _ in batch])
                targets = torch.tensor([index_of[label] for _, label in batch])
                loss = torch.nn.functional.cross_entropy(network(**inputs).logits, targets)
                if not torch.isfinite(loss):
                    raise TrainingError(f"the loss of the expert '{name}' is not finite; lower its learning rate")
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                bar.advance()
    network.eval()


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


def _parameter_groups(network: Any, settings: TrainingSettings) -> list[dict[str, Any]]:
    """Group parameters by learning rate and weight decay; only matrices decay."""
    prefix = f"{network.base_model_prefix}."
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            rate = settings.learning_rate if name.startswith(prefix) else settings.head_learning_rate
            decay = settings.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": group, "lr": rate, "weight_decay": decay} for (rate, decay), group in groups.items()]


@contextmanager
def quiet_transformers() -> Iterator[None]:
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
