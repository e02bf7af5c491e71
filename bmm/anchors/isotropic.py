"""Isotropic merging, Iso-C and Iso-CTS (Marczak et al., arXiv 2502.04959).

For each linear map of rank bound `r = min(out, in)`, with `Σ τ_t = U S Vᵀ`:

* **Iso-C** gives every direction of the summed task vectors the same strength: `W = W_0 + scale · mean(S) · U Vᵀ`.
* **Iso-CTS** keeps the `k = r − nT` leading directions of the sum, `U_c S_c V_cᵀ`, where
  `n = round((r − ⌊fraction · r⌋)/T)`, and fills the rest with the `n` leading singular triplets of each task's residual
  `τ_t − U_c U_cᵀ τ_t`. Both factors, all triplets side by side, are replaced by their polar factors and all singular
  values by their mean:
  `W = W_0 + scale · mean(s) · polar(U_*) polar(V_*)ᵀ`.

Every other tensor gets `scale` times the mean of the task vectors. Where the published code is defined only by
rounding, this one is definite: singular values below 1e-6 of the largest bring no direction (the published code
gives rounding's directions the same strength as all others; the mean is over `r` values all the same); experts that
left a map alone do not count among the `T`; and `n` is never above `⌊r/T⌋` (half-to-even rounding can ask for more
than `r` directions). The published code isotropises every matrix, embeddings too; here those are averaged.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bmm.anchors.settings import IsoCSettings, IsoCTSSettings
from bmm.anchors.spectra import polar_factor, rank_of
from bmm.anchors.task_vectors import LinearMapAnchor, TaskVectors, number


class IsoC(LinearMapAnchor):
    """Merges linear maps with one strength for all common directions and averages the rest."""

    def __init__(self, settings: IsoCSettings) -> None:
        self.settings = settings

    @property
    def scale(self) -> float:
        """What the isotropic task vector is multiplied by."""
        return number(self.settings.scale)

    def combine(self, vectors: TaskVectors) -> Tensor | None:
        """Return the isotropic task vector."""
        total = vectors.total()
        return None if total is None else isotropic(total)


class IsoCTS(LinearMapAnchor):
    """Merges linear maps with one strength for common and task-specific directions and averages the rest."""

    def __init__(self, settings: IsoCTSSettings) -> None:
        self.settings = settings

    @property
    def scale(self) -> float:
        """What the isotropic task vector is multiplied by."""
        return number(self.settings.scale)

    def combine(self, vectors: TaskVectors) -> Tensor | None:
        """Return the isotropic task vector."""
        return common_and_specific(vectors, self.settings.common)


def isotropic(matrix: Tensor) -> Tensor:
    """Return `mean(S) U Vᵀ` of a matrix (out, in) that is `U S Vᵀ`, on the directions that it spans."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    rank = rank_of(S)
    result: Tensor = S.mean() * (U[:, :rank] @ Vh[:rank])
    return result


def common_and_specific(vectors: TaskVectors, fraction: float) -> Tensor | None:
    """Return the Iso-CTS combination `(out, in)`, float64, or None where every expert equals the base."""
    experts = sum(1 for _ in vectors)
    total = vectors.total()
    if total is None:
        return None
    bound = min(total.shape)
    specific = min(round((bound - int(bound * fraction)) / experts), bound // experts)
    U, S, Vh = torch.linalg.svd(total, full_matrices=False)
    common = min(bound - specific * experts, rank_of(S))
    U, S, Vh = U[:, :common], S[:common], Vh[:common]
    left, values, right = [U], [S], [Vh.T]
    for vector in vectors:
        if specific == 0:
            break
        own = torch.linalg.svd(vector - U @ (U.T @ vector), full_matrices=False)
        # Of a task that lies within the common directions only rounding is left, of the task vector's size.
        kept = min(specific, rank_of(own.S, float(torch.linalg.matrix_norm(vector, 2))))
        left.append(own.U[:, :kept].clone())
        values.append(own.S[:kept].clone())
        right.append(own.Vh[:kept].T.clone())
    result: Tensor = polar_factor(torch.cat(left, 1)) @ polar_factor(torch.cat(right, 1)).T
    return float(torch.cat(values).sum() / bound) * result
