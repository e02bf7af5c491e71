"""What the methods of singular vectors share: numerical rank, leading triplets, the polar factor. No method lives here.

Of a large matrix only one side is decomposed: the eigenvectors of the smaller of `AAᵀ` and `AᵀA` are singular vectors,
and a product gives the others. That takes a fraction of the time of a whole decomposition, but of small singular values
it knows less: theirs and their vectors' errors are about `ε (s_max / s)²`. Where a direction that is wanted is that
small (or the matrix is), the whole decomposition is taken.
"""

from __future__ import annotations

import torch
from torch import Tensor

RELATIVE_CUTOFF = 1e-6
"""Singular values at or below this share of the largest count as zero: float32 rounding of the stored weights."""
LARGE = 256
"""Matrices whose smaller side is at least this long are decomposed by one side."""
_ONE_SIDED = 1e-4
"""The least share of the largest singular value that one side is trusted with: errors of 2e-8 in the vectors."""


def rank_of(singular_values: Tensor, largest: float | None = None) -> int:
    """Return how many singular values (descending) are above the cutoff; `largest` is the scale, if not their own."""
    cutoff = RELATIVE_CUTOFF * (float(singular_values[0]) if largest is None else largest)
    return int((singular_values > cutoff).sum())


def leading_triplets(matrix: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return `U` (rows, k), `S` (k,) and `V` (columns, k) of a matrix: its `most` largest triplets above the cutoff."""
    tall = matrix.shape[0] > matrix.shape[1]
    found = _one_side(matrix if tall else matrix.T, most)
    if found is None:
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        rank = min(most, rank_of(S))
        return U[:, :rank].clone(), S[:rank].clone(), Vh[:rank].T.clone()
    values, vectors = found
    others = ((matrix if tall else matrix.T) @ vectors) / values
    return (others, values, vectors) if tall else (vectors, values, others)


def polar_factor(matrix: Tensor) -> Tensor:
    """Return the partial isometry nearest to `matrix` (rows, columns), on the directions that it spans."""
    tall = matrix.shape[0] > matrix.shape[1]
    found = _one_side(matrix if tall else matrix.T, min(matrix.shape))
    if found is None:
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        rank = rank_of(S)
        isometry: Tensor = U[:, :rank] @ Vh[:rank]
        return isometry
    values, vectors = found
    root = (vectors / values) @ vectors.T
    return matrix @ root if tall else root @ matrix


def _one_side(tall: Tensor, most: int) -> tuple[Tensor, Tensor] | None:
    """Return the largest singular values (k,) and right vectors (columns, k) above the cutoff, None where in doubt."""
    if tall.shape[1] < LARGE:
        return None
    squares, vectors = torch.linalg.eigh(tall.T @ tall)
    values = squares.flip(0).clamp(min=0).sqrt()
    rank = min(most, rank_of(values))
    if rank and float(values[rank - 1]) < _ONE_SIDED * float(values[0]):
        return None
    return values[:rank].clone(), vectors.flip(1)[:, :rank].contiguous()
