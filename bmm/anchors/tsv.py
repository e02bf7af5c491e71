"""TSV-M, task singular vectors (Gargiulo et al., arXiv 2412.00081).

For each linear map of rank bound `r = min(out, in)` and `T` experts, keep the `⌊r/T⌋` largest singular
triplets of each task vector, `τ_t ≈ U_t S_t V_tᵀ`, concatenate them, and replace both factors by the
nearest ones with orthonormal columns (the polar factor, from an SVD), so that the tasks' directions no
longer overlap:

    W = W_0 + scale · polar([U_1 … U_T]) diag(S_1 … S_T) polar([V_1 … V_T])ᵀ

Every other tensor gets `scale` times the mean of the task vectors. Where the published procedure is defined
only by rounding, this one is definite: experts that left a map alone claim no share of `T`; singular values
below 1e-6 of the largest (float32 rounding of the stored weights) bring no directions; directions that the
concatenated factor does not span stay out of its polar factor; with more experts than `r`, each keeps one
triplet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bmm.anchors.interface import Treatment
from bmm.anchors.settings import TSVSettings
from bmm.anchors.task_vectors import TaskVectorAnchor, TaskVectors

RELATIVE_CUTOFF = 1e-6
"""Singular values at or below this share of the largest count as zero."""


class TSV(TaskVectorAnchor):
    """Merges linear maps by their task singular vectors and averages the rest."""

    def __init__(self, settings: TSVSettings) -> None:
        self.settings = settings

    def update(self, vectors: TaskVectors, *, linear: bool) -> tuple[Tensor | None, Treatment]:
        """Return the merged task vector."""
        merged = merge_singular_vectors(vectors) if linear else vectors.mean()
        treatment: Treatment = "anchored" if linear else "averaged"
        return (None if merged is None else self.settings.scale * merged), treatment


def merge_singular_vectors(vectors: TaskVectors) -> Tensor | None:
    """Return the TSV-M combination `(out, in)`, float64, or None where every expert equals the base."""
    experts = sum(1 for _ in vectors)
    if experts == 0:
        return None
    share = max(1, min(vectors.base.shape) // experts)
    left, values, right = [], [], []
    for vector in vectors:
        U, S, Vh = torch.linalg.svd(vector, full_matrices=False)
        rank = min(share, _rank(S))
        left.append(U[:, :rank].clone())
        values.append(S[:rank].clone())
        right.append(Vh[:rank].T.clone())
    return (polar_factor(torch.cat(left, dim=1)) * torch.cat(values)) @ polar_factor(torch.cat(right, dim=1)).T


def polar_factor(matrix: Tensor) -> Tensor:
    """Return the partial isometry nearest to `matrix` (rows, columns), on the directions that it spans."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    rank = _rank(S)
    isometry: Tensor = U[:, :rank] @ Vh[:rank]
    return isometry


def _rank(singular_values: Tensor) -> int:
    cutoff = RELATIVE_CUTOFF * float(singular_values[0])
    return int((singular_values > cutoff).sum())
