"""The diagonal Fisher information of one expert, row by row (Matena & Raffel, arXiv 2111.09832).

    F = 1/n Σ_i E_{y ~ p(y|x_i)} [ (∇_θ log p(y | x_i))² ]

over the shared encoder weights `θ`. The expectation is taken whole (`expected`), by one class drawn from the expert's
own answer for each row (`sampled`), or replaced by the row's label (`data`, the "empirical" Fisher information). Each
row's own gradient is squared, never a batch's. How experts are merged with it is `bmm.anchors.fisher`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from bmm.errors import RecipeError
from bmm.evaluation.model import TaskModel
from bmm.progress import Bar

Labels = Literal["sampled", "expected", "data"]


def diagonal_fisher(
    model: TaskModel, rows: Sequence[Any], names: Sequence[str], *, labels: Labels, seed: int, bar: Bar
) -> dict[str, Tensor]:
    """Return each encoder parameter's Fisher information, of its shape, float64; zero where no gradient comes.

    Args:
        model: the expert, head and encoder loaded; its weights are left as they are.
        rows: at least one, with class ids as their labels.
        names: canonical names of the encoder's tensors that are wanted; those that are no parameters get zeros.
        labels: whose gradients are squared.
        seed: of the drawn classes, one draw for each row in the order given.
        bar: advanced by one a row.

    Raises:
        FloatingPointError: a gradient is not finite.
        RecipeError: the model does not answer one class a row.
    """
    stored: dict[str, Tensor] = model.encoder.state_dict(keep_vars=True)
    # Tied weights stand under several names and are one parameter.
    parameters = {id(stored[name]): stored[name] for name in names if isinstance(stored[name], torch.nn.Parameter)}
    sums = {key: torch.zeros(tensor.shape, dtype=torch.float64) for key, tensor in parameters.items()}
    draws = torch.rand(len(rows), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    prepared = model.prepare(rows)
    wanted = list(parameters.values())
    try:
        for tensor in wanted:
            tensor.requires_grad_(True)
        for place, batch in zip(prepared.order, prepared.batches(1), strict=True):
            logits = model.module(**batch, return_dict=True).logits
            if logits.ndim != 2 or logits.shape[1] < 2:
                raise RecipeError(
                    f"the method 'fisher' needs experts that answer one class a row, which {model.task} does not; "
                    "choose another method"
                )
            logs = logits[0].log_softmax(-1)
            for label, share in _weighted(logs.detach(), labels, rows[place].label, float(draws[place])):
                gradients = torch.autograd.grad(logs[label], wanted, retain_graph=True, allow_unused=True)
                for key, gradient in zip(sums, gradients, strict=True):
                    if gradient is not None:
                        sums[key] += share * gradient.to(torch.float64).square()
            bar.advance()
    finally:
        for tensor in wanted:
            tensor.requires_grad_(False)
    for name in names:
        if id(stored[name]) in sums and not bool(torch.isfinite(sums[id(stored[name])]).all()):
            raise FloatingPointError(f"the gradients of {name} in the model of {model.task} are not finite")
    return {
        name: sums[id(stored[name])] / len(rows)
        if id(stored[name]) in sums
        else torch.zeros(stored[name].shape, dtype=torch.float64)
        for name in names
    }


def _weighted(logs: Tensor, labels: Labels, label: int, draw: float) -> list[tuple[int, float]]:
    """Return the classes whose gradients count for one row, with their shares."""
    if labels == "data":
        return [(label, 1.0)]
    probabilities = logs.to(torch.float64).exp()
    if labels == "expected":
        return [(index, float(share)) for index, share in enumerate(probabilities)]
    edges = probabilities.cumsum(0)
    drawn = int(torch.searchsorted(edges, draw * float(edges[-1]), right=True))
    return [(min(drawn, len(logs) - 1), 1.0)]
