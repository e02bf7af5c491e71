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
triplet (the published code none).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bmm.anchors.settings import TSVSettings
from bmm.anchors.spectra import leading_triplets, polar_factor
from bmm.anchors.task_vectors import LinearMapAnchor, TaskVectors, number


class TSV(LinearMapAnchor):
    """Merges linear maps by their task singular vectors and averages the rest."""

    def __init__(self, settings: TSVSettings) -> None:
        self.settings = settings

    @property
    def scale(self) -> float:
        """What the merged task vector is multiplied by."""
        return number(self.settings.scale)

    def combine(self, vectors: TaskVectors) -> Tensor | None:
        """Return the merged task vector."""
        return merge_singular_vectors(vectors)


def merge_singular_vectors(vectors: TaskVectors) -> Tensor | None:
    """Return the TSV-M combination `(out, in)`, float64, or None where every expert equals the base."""
    experts = sum(1 for _ in vectors)
    if experts == 0:
        return None
    share = max(1, min(vectors.base.shape) // experts)
    left: list[Tensor] = []
    values: list[Tensor] = []
    right: list[Tensor] = []
    for vector in vectors:
        for parts, part in zip((left, values, right), leading_triplets(vector, share), strict=True):
            parts.append(part)
    return (polar_factor(torch.cat(left, dim=1)) * torch.cat(values)) @ polar_factor(torch.cat(right, dim=1)).T
