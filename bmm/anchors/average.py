"""The plain mean of the experts: `W_0 + Σ τ_t / T`, which is `Σ W_t / T` (model soup, arXiv 2203.05482)."""

from __future__ import annotations

from torch import Tensor

from bmm.anchors.interface import Weights
from bmm.anchors.settings import AverageSettings
from bmm.anchors.task_vectors import ScaledAnchor, TaskVectorAnchor, TaskVectors


class Average(TaskVectorAnchor):
    """Averages every floating-point tensor."""

    treatment = "averaged"

    def __init__(self, settings: AverageSettings) -> None:
        self.settings = settings

    def piecewise(self, name: str, weights: Weights) -> ScaledAnchor | None:  # noqa: ARG002
        """Return this method: it treats each entry alone."""
        return self

    def combine(self, vectors: TaskVectors) -> Tensor | None:
        """Return the mean of the task vectors."""
        return vectors.mean()
