"""RegMean, the regression without a prior (Jin et al., arXiv 2212.09849).

    W = (Σ_t W_t G̃_t)(Σ_t G̃_t)⁻¹        G̃_t = α G_t + (1 − α) diag(G_t)

Only linear maps: biases, norms and embeddings are averaged by whoever calls.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from scipy.linalg.lapack import dpocon
from torch import Tensor

from bmm.errors import BMMError
from bmm.regression.posterior import RELATIVE_CUTOFF, checked_gram, decompose, factor, residual

_MARGIN = 10.0
"""By how much LAPACK's estimate of a condition number may be too small; rarely above 3."""


def shrink(gram: Tensor, alpha: float) -> Tensor:
    """Return `α G + (1 − α) diag(G)` (in, in), float64.

    Raises:
        BMMError: `alpha` is not between 0 and 1.
    """
    if not 0 <= alpha <= 1:
        raise BMMError(f"the share of off-diagonal entries that RegMean keeps must be between 0 and 1, not {alpha}")
    gram = gram.to(torch.float64)
    return alpha * gram + (1 - alpha) * gram.diagonal().diag()


def regmean(experts: Sequence[Tensor], grams: Sequence[Tensor], *, alpha: float, where: str) -> Tensor:
    """Return RegMean's weight (out, in), float64, from experts' weights (out, in) and their Grams (in, in).

    Each output row is solved for on its own, so maps that read the same input may be stacked along `out`.
    It is computed as the experts' mean plus a correction, which is the closed form wherever that exists;
    directions that no input had keep the mean. Weights and Grams are read several times and not kept, so a sequence
    that reads them from disk needs the memory of one at a time.

    Raises:
        BMMError: there are no experts, shapes do not fit, a weight or Gram is not finite (naming `where`),
            or `alpha` is not between 0 and 1.
    """
    if not experts:
        raise BMMError(f"RegMean of {where} was asked for without experts")
    mean = _sum(experts, f"an expert's weight {where}") / len(experts)
    total = _sum((shrink(gram, alpha) for gram in grams), f"the Gram matrix of {where}")
    correction = residual(mean, experts, (shrink(gram, alpha) for gram in grams))
    root = _root(total, where)
    if root is None:
        return factor(decompose(total, where=where), mean, correction).mean(0.0)
    return mean + torch.cholesky_solve(correction.T, root).T


def _root(total: Tensor, where: str) -> Tensor | None:
    """Return the Cholesky factor (in, in) of a sum in which every direction was seen; None where one may not be.

    It takes a thirtieth of an eigendecomposition's operations. The condition number by the 1-norm is at least that of
    the eigenvalues, which `RELATIVE_CUTOFF` is about.
    """
    gram = checked_gram(total, where)
    root, failed = torch.linalg.cholesky_ex((gram + gram.T) / 2)
    if bool(failed):
        return None
    share, _ = dpocon(root.numpy(), float(torch.linalg.matrix_norm(gram, 1)), uplo="L")
    return root if share > _MARGIN * RELATIVE_CUTOFF else None


def _sum(tensors: Iterable[Tensor], what: str) -> Tensor:
    total: Tensor | None = None
    for tensor in tensors:
        if not bool(torch.isfinite(tensor).all()):
            raise BMMError(f"{what} holds NaN or infinite values")
        if total is None:
            total = torch.zeros_like(tensor, dtype=torch.float64)
        elif tensor.shape != total.shape:
            raise BMMError(f"{what} differs in shape from another expert's")
        total += tensor.to(torch.float64)
    if total is None:
        raise BMMError(f"{what} was asked for, but there is none")
    return total
