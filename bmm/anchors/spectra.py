"""What the methods of singular vectors share: numerical rank and the polar factor. No method lives here."""

from __future__ import annotations

import torch
from torch import Tensor

RELATIVE_CUTOFF = 1e-6
"""Singular values at or below this share of the largest count as zero: float32 rounding of the stored weights."""


def rank_of(singular_values: Tensor, largest: float | None = None) -> int:
    """Return how many singular values (descending) are above the cutoff; `largest` is the scale, if not their own."""
    cutoff = RELATIVE_CUTOFF * (float(singular_values[0]) if largest is None else largest)
    return int((singular_values > cutoff).sum())


def polar_factor(matrix: Tensor) -> Tensor:
    """Return the partial isometry nearest to `matrix` (rows, columns), on the directions that it spans."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    rank = rank_of(S)
    isometry: Tensor = U[:, :rank] @ Vh[:rank]
    return isometry
