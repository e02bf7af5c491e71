"""ACE-Merging (Xu et al., CVPR 2026, arXiv 2603.02945): the inputs' covariances estimated from the task vectors.

What follows is the procedure of the authors' published code (github.com/unravel-xu/ACE-Merging); the paper's own
text was not at hand, so where the two may differ this is the code. For each linear map, with `τ_t` (out, in), `τ̄_t`
the same with the mean of each column taken out, `Σ_t = τ̄_tᵀ τ̄_t` (in, in) and `tr_t` its trace:

1. The tasks count as *heterogeneous* where the variance of `log ‖τ_t‖²` over the tasks (with T − 1) exceeds `threshold`
   times its squared mean. Then every `Σ_t` and its share of the ridge are divided by `tr_t`; else nothing is.
2. `M = [sum_t τ̄_t (Σ_t + ε_t I)] [sum_t (Σ_t + ε_t I) + 1 cᵀ]⁻¹`, with `c` the column means of `sum_t Σ_t`, divided by
   the mean of `‖τ_t‖²` where heterogeneous: the "collective structural prior". The second bracket is not symmetric,
   but never singular.
3. Heterogeneous maps get a spectral correction: of `sum_t τ_t (Σ_t − S̄) + M`, with `S̄` the mean of `Σ_t + ε_t I`, the
   leading `spectrum` share of singular directions is added to `M`, each with the mean of their singular values.

The result is `W_0 + scale · M`. It is not invariant to the scale of the weights (`ε` is absolute, and so is the squared
mean in step 1), and one expert does not merge to itself: its columns' means are lost. Every other tensor gets the mean
of the task vectors. The published code treats every matrix but `text_projection` so, embeddings too; here experts that
left a map alone do not count, and the correction has at least one direction (the code divides by zero below four).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bmm.anchors.settings import ACESettings
from bmm.anchors.task_vectors import LinearMapAnchor, TaskVectors, number

_TINY = 1e-12


class ACE(LinearMapAnchor):
    """Merges linear maps by covariances estimated from their task vectors and averages the rest."""

    def __init__(self, settings: ACESettings) -> None:
        self.settings = settings

    @property
    def scale(self) -> float:
        """What the merged task vector is multiplied by."""
        return number(self.settings.scale)

    def combine(self, vectors: TaskVectors) -> Tensor | None:
        """Return the merged task vector."""
        settings = self.settings
        energies = torch.tensor([float(vector.square().sum()) for vector in vectors], dtype=torch.float64)
        if not len(energies):
            return None
        apart = heterogeneous(energies, settings.threshold)
        total, target, ridge = _normal_equations(vectors, settings.ridge, normalise=apart)
        prior = total.mean(dim=0)
        if apart:
            prior = prior / (energies.mean() + _TINY)
        total.diagonal().add_(ridge)
        merged: Tensor = torch.linalg.solve(total + prior, target, left=False)
        if apart:
            merged += _correction(vectors, merged, total / len(energies), settings.spectrum)
        return merged


def heterogeneous(energies: Tensor, threshold: float) -> bool:
    """Say whether the tasks' squared norms (tasks,) lie so far apart that each is to be normalised by its own."""
    if len(energies) < 2:
        return False
    logs = (energies + _TINY).log()
    return bool(logs.var() / (logs.mean().square() + _TINY) > threshold)


def _normal_equations(vectors: TaskVectors, ridge: float, *, normalise: bool) -> tuple[Tensor, Tensor, float]:
    """Return `sum_t Σ_t` (in, in), `sum_t τ̄_t (Σ_t + ε_t I)` (out, in), and `sum_t ε_t`."""
    inputs = vectors.base.shape[1]
    total = torch.zeros(inputs, inputs, dtype=torch.float64)
    target = torch.zeros_like(vectors.base)
    ridges = 0.0
    for vector in vectors:
        centred = vector - vector.mean(dim=0)
        covariance, divisor = _covariance(centred, normalise=normalise)
        total += covariance
        target += centred @ covariance + centred * (ridge / divisor)
        ridges += ridge / divisor
    return total, target, ridges


def _covariance(centred: Tensor, *, normalise: bool) -> tuple[Tensor, float]:
    """Return `Σ_t` of a centred task vector, and what it was divided by."""
    covariance = centred.T @ centred
    divisor = float(covariance.trace()) + _TINY if normalise else 1.0
    return covariance / divisor, divisor


def _correction(vectors: TaskVectors, merged: Tensor, mean: Tensor, spectrum: float) -> Tensor:
    fused = merged.clone()
    for vector in vectors:
        covariance, _ = _covariance(vector - vector.mean(dim=0), normalise=True)
        fused += vector @ (covariance - mean)
    U, S, Vh = torch.linalg.svd(fused, full_matrices=False)
    kept = max(1, int(len(S) * spectrum))
    correction: Tensor = S[:kept].mean() * (U[:, :kept] @ Vh[:kept])
    return correction
