"""WUDI-Merging (Cheng et al., arXiv 2503.08099).

For each linear map the merged task vector `M` minimises `Σ_t ‖(M − τ_t) τ_tᵀ‖²_F / ‖τ_t‖²_F`. With `Ĝ_t =
τ_tᵀ τ_t / ‖τ_t‖²_F` the gradient is `2 (M Σ Ĝ_t − Σ τ_t Ĝ_t)`, so

* `solver: exact` is the minimiser of least norm, `M = (Σ τ_t Ĝ_t)(Σ Ĝ_t)⁺`, by one eigendecomposition in
  float64;
* `solver: adam` is the published schedule: start at `Σ τ_t`, Adam with a learning rate of 1e-5, 300 steps.
  It stops long before the minimum and, unlike the minimiser, depends on the scale of the weights.

Every other tensor gets the mean of the task vectors (the published code leaves it at the base).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bmm.anchors.interface import Treatment
from bmm.anchors.settings import WUDISettings
from bmm.anchors.task_vectors import TaskVectorAnchor, TaskVectors

RELATIVE_CUTOFF = 1e-10
"""Eigenvalues of `Σ Ĝ_t` at or below this share of the largest count as zero.

They are squares of singular values: 1e-5 of the largest there, above what rounding stored weights to
float32 adds to a task vector of low rank, since the minimiser would blow such directions up.
"""


class WUDI(TaskVectorAnchor):
    """Merges linear maps with the least interference and averages the rest."""

    def __init__(self, settings: WUDISettings) -> None:
        self.settings = settings

    def update(self, vectors: TaskVectors, *, linear: bool) -> tuple[Tensor | None, Treatment]:
        """Return the merged task vector."""
        if not linear:
            return vectors.mean(), "averaged"
        system = normal_equations(vectors)
        if system is None:
            return None, "anchored"
        gram, target = system
        if self.settings.solver == "exact":
            return minimise(gram, target), "anchored"
        start = vectors.total()
        if start is None:
            return None, "anchored"
        return descend(start, gram, target, self.settings.steps, self.settings.learning_rate), "anchored"


def normal_equations(vectors: TaskVectors) -> tuple[Tensor, Tensor] | None:
    """Return `Σ Ĝ_t` (in, in) and `Σ τ_t Ĝ_t` (out, in), float64; None if every expert equals the base."""
    inputs = vectors.base.shape[1]
    gram = torch.zeros(inputs, inputs, dtype=torch.float64)
    target = torch.zeros_like(vectors.base)
    changed = False
    for vector in vectors:
        changed = True
        direction = vector / torch.linalg.matrix_norm(vector)
        own = direction.T @ direction
        gram += own
        target += vector @ own
    return (gram, target) if changed else None


def minimise(gram: Tensor, target: Tensor) -> Tensor:
    """Return `target gram⁺` (out, in) for a positive semi-definite `gram` (in, in) that is not zero."""
    values, U = torch.linalg.eigh(gram)
    kept = values > RELATIVE_CUTOFF * values[-1]
    U = U[:, kept]
    minimiser: Tensor = ((target @ U) / values[kept]) @ U.T
    return minimiser


def descend(start: Tensor, gram: Tensor, target: Tensor, steps: int, learning_rate: float) -> Tensor:
    """Return where Adam gets from `start` (out, in) in `steps` steps on the objective's own gradient."""
    point = start.clone()
    optimizer = torch.optim.Adam([point], lr=learning_rate)
    for _ in range(steps):
        point.grad = 2 * (point @ gram - target)
        optimizer.step()
    point.grad = None
    return point
