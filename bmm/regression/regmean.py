"""RegMean, the regression without a prior (Jin et al., arXiv 2212.09849).

    W = (Σ_t W_t G̃_t)(Σ_t G̃_t)⁻¹        G̃_t = α G_t + (1 − α) diag(G_t)

Only linear maps: biases, norms and embeddings are averaged by whoever calls.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bmm.errors import BMMError
from bmm.regression.posterior import decompose, factor, residual

ALPHA = 0.9
"""What is kept of the off-diagonal entries, by default."""


def shrink(gram: Tensor, alpha: float) -> Tensor:
    """Return `α G + (1 − α) diag(G)` (in, in), float64.

    Raises:
        BMMError: `alpha` is not between 0 and 1.
    """
    if not 0 <= alpha <= 1:
        raise BMMError(f"the share of off-diagonal entries that RegMean keeps must be between 0 and 1, not {alpha}")
    gram = gram.to(torch.float64)
    return alpha * gram + (1 - alpha) * gram.diagonal().diag()


def regmean(experts: Sequence[Tensor], grams: Sequence[Tensor], *, alpha: float = ALPHA, where: str) -> Tensor:
    """Return RegMean's weight (out, in), float64, from experts' weights (out, in) and their Grams (in, in).

    Each output row is solved for on its own, so maps that read the same input may be stacked along `out`.
    It is computed as the experts' mean plus a correction, which is the closed form wherever that exists;
    directions that no input had keep the mean.

    Raises:
        BMMError: there are no experts, shapes do not fit, a weight or Gram is not finite (naming `where`),
            or `alpha` is not between 0 and 1.
    """
    if not experts:
        raise BMMError(f"RegMean of {where} was asked for without experts")
    for expert in experts:
        if not bool(torch.isfinite(expert).all()):
            raise BMMError(f"an expert's weight {where} holds NaN or infinite values")
    if len({expert.shape for expert in experts}) > 1 or len({gram.shape for gram in grams}) > 1:
        raise BMMError(f"the experts' weights or Gram matrices of {where} differ in shape")
    shrunk = [shrink(gram, alpha) for gram in grams]
    mean = torch.zeros_like(experts[0], dtype=torch.float64)
    for expert in experts:
        mean += expert.to(torch.float64)
    mean /= len(experts)
    correction = residual(mean, experts, shrunk)
    total = torch.zeros_like(shrunk[0])
    for gram in shrunk:
        total += gram
    return factor(decompose(total, where=where), mean, correction).mean(0.0)
