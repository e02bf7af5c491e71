"""The posterior mean at one given prior strength: a Cholesky factor instead of an eigendecomposition.

    Ŵ = W_a + [Σ_t (W_t − W_a) G_t] (Σ_t G_t + λ̄ I)⁻¹        λ̄ = λ · tr(Σ_t G_t)/in

For a walk through the network, which goes on with one `λ`, and needs the answer at no other. Everything is float64.
Any `λ` from one factorisation is `bmm.regression.posterior`, whose conventions hold here.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from bmm.errors import BMMError
from bmm.regression.posterior import NEGATIVE, RELATIVE_CUTOFF, checked_gram

_MARGIN = 4
_SMALL = 16
_TOLERANCE = 1e-3


def serves(size: int, lam: float) -> bool:
    """Say whether every direction of a Gram matrix (size, size) is sure to count as seen at `lam`, whatever it holds.

    Its largest eigenvalue is at most its trace, so `λ̄` is at least `lam/size` of it. Where that is not well above
    `RELATIVE_CUTOFF`, some directions may have to keep the anchor, which only an eigendecomposition tells.
    """
    return lam / size > _MARGIN * RELATIVE_CUTOFF


class Ridge:
    """`Σ_t G_t + λ̄ I`, factored.

    Args:
        gram_sum: `Σ_t G_t` (in, in); a zero matrix is allowed, and keeps the anchor.
        lam: the relative prior strength `λ`, one that `serves`.
        where: what the matrix is of, for messages.

    Raises:
        BMMError: the matrix is not what `bmm.regression.posterior.decompose` takes, or `lam` is too small for it.

    Attributes:
        trace: of the sum.
        condition: the condition number of what is inverted, to about a thousandth; inf for a zero matrix.
    """

    def __init__(self, gram_sum: Tensor, lam: float, *, where: str) -> None:
        gram = checked_gram(gram_sum, where)
        if not serves(gram.shape[0], lam):
            raise BMMError(f"a prior strength of {lam:g} is too small for a Cholesky factor of {where}")
        self.trace = float(gram.diagonal().sum())
        self.condition = float("inf")
        if self.trace == 0:
            return
        shift = lam * self.trace / gram.shape[0]
        matrix = gram.clone()
        matrix.diagonal().add_(shift)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if int(failed):
            raise BMMError(f"the Gram matrix of {where} has a negative eigenvalue; collect it again")
        self._factor = factor
        smallest, largest = _ends(matrix, factor)
        if smallest - shift < -NEGATIVE * (largest - shift):
            raise BMMError(f"the Gram matrix of {where} has a negative eigenvalue; collect it again")
        # Rounding may have pushed an eigenvalue of the Gram matrix below zero.
        self.condition = largest / max(smallest, shift)

    def mean(self, anchor: Tensor, pull: Tensor) -> Tensor:
        """Return `Ŵ` (out, in), float64, for an anchor (out, in) and `pull = Σ_t (W_t − W_a) G_t` (out, in)."""
        if self.trace == 0:
            return anchor.to(torch.float64, copy=True)
        solved = torch.cholesky_solve(pull.to(torch.float64).T, self._factor).T
        return anchor.to(torch.float64) + solved


def _ends(matrix: Tensor, factor: Tensor) -> tuple[float, float]:
    """Return the smallest and the largest eigenvalue of a positive definite matrix, by Lanczos' method."""
    size = matrix.shape[0]
    if size < _SMALL:
        values = torch.linalg.eigvalsh(matrix)
        return float(values[0]), float(values[-1])

    def times(vector: np.ndarray) -> np.ndarray:
        found: np.ndarray = (matrix @ torch.from_numpy(vector.reshape(-1))).numpy()
        return found

    def divided(vector: np.ndarray) -> np.ndarray:
        found: np.ndarray = torch.cholesky_solve(torch.from_numpy(vector.reshape(-1, 1)), factor).reshape(-1).numpy()
        return found

    # Always the same start, for equal digits; drawn, so that it is orthogonal to no eigenvector.
    start = np.random.default_rng(0).standard_normal(size)

    def largest_of(product: object) -> float:
        operator = LinearOperator((size, size), matvec=product, dtype=np.float64)
        found = eigsh(operator, k=1, which="LA", v0=start, tol=_TOLERANCE, return_eigenvectors=False)
        return float(found[0])

    return 1 / largest_of(divided), largest_of(times)
