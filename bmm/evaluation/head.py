"""The last layer of a task's own head: finding it, and what it reads and answers.

Heads differ by architecture; the last layer is the `nn.Linear` outside of the encoder whose answer is the model's own,
or, in a decoder, whose answer at one place of each row is: such a model answers at every token and keeps the last.
Where there is none (CLIP's comparison with the classes' names, a language model whose output layer is merged), there is
no head to fit. What is made of its rows is `bmm.regression.head`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bmm.evaluation.model import Prepared, TaskModel


def layers_outside(model: TaskModel) -> dict[str, nn.Linear]:
    """Return the linear layers of a model outside of its encoder, by name."""
    inside = set(model.encoder.modules())
    return {
        name: module
        for name, module in model.module.named_modules()
        if isinstance(module, nn.Linear) and module not in inside
    }


def last_layer(model: TaskModel, prepared: Prepared) -> str | None:
    """Return the name in the model of the layer whose answer is the model's, or None if there is none.

    Args:
        model: with its head loaded, and its encoder's weights there or coming.
        prepared: rows, of which the first batch is run.
    """
    outside = layers_outside(model)
    seen: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: seen.update({name: output}))
        for name, module in outside.items()
    ]
    try:
        answer = _answer(model, next(iter(model.batches(prepared))))
    finally:
        for handle in handles:
            handle.remove()
    found = [name for name, output in seen.items() if _answers(output, answer)]
    return found[-1] if found else None


def rows_at(model: TaskModel, name: str, prepared: Prepared) -> tuple[Tensor, Tensor]:
    """Return what a layer reads, `(rows, features)`, and what it answers, `(rows, classes)`, rows in batch order.

    A row is a row of the task or, where tokens are answered for, a token; those of padding are left out.
    """
    inputs, answers = [], []
    with _watched(model.module.get_submodule(name)) as seen:
        for batch in model.batches(prepared):
            seen.clear()
            answer = _answer(model, batch)
            mask = batch.get("attention_mask")
            for read, answered in seen:
                if read.ndim == 2:
                    kept: Any = slice(None)
                elif answer.ndim == 2:
                    kept = (torch.arange(len(read)), _places(answered, answer))
                else:
                    kept = torch.ones(read.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
                inputs.append(read[kept])
                answers.append(answered[kept])
    return torch.cat(inputs), torch.cat(answers)


def _answers(output: Tensor, answer: Tensor) -> bool:
    """Say whether a layer's output is the model's answer, or holds it at one place of each row."""
    if output.shape == answer.shape:
        return torch.equal(output, answer)
    if output.ndim != 3 or answer.ndim != 2 or (len(output), output.shape[2]) != tuple(answer.shape):
        return False
    return bool(_agree(output, answer).any(dim=1).all())


def _places(output: Tensor, answer: Tensor) -> Tensor:
    """Return for each row the last place at which `(rows, places, classes)` holds its answer, `(rows, classes)`."""
    return output.shape[1] - 1 - _agree(output, answer).flip(1).int().argmax(dim=1)


def _agree(output: Tensor, answer: Tensor) -> Tensor:
    return (output == answer[:, None]).all(dim=2)


def _answer(model: TaskModel, batch: dict[str, Any]) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model.module(**batch, return_dict=True).logits
    return found


@contextmanager
def _watched(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    seen: list[tuple[Tensor, Tensor]] = []
    handle = module.register_forward_hook(lambda _module, inputs, output: seen.append((inputs[0], output)))
    try:
        yield seen
    finally:
        handle.remove()
