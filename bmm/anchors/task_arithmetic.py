"""Task arithmetic: `W_0 + scale · Σ τ_t` on every tensor (Ilharco et al., arXiv 2212.04089)."""

from __future__ import annotations

from torch import Tensor

from bmm.anchors.interface import Weights
from bmm.anchors.settings import TaskArithmeticSettings
from bmm.anchors.task_vectors import ScaledAnchor, TaskVectorAnchor, TaskVectors, number


class TaskArithmetic(TaskVectorAnchor):
    """Adds the scaled sum of the task vectors."""

    def __init__(self, settings: TaskArithmeticSettings) -> None:
        self.settings = settings

    @property
    def scale(self) -> float:
        """What the sum is multiplied by."""
        return number(self.settings.scale)

    def piecewise(self, name: str, weights: Weights) -> ScaledAnchor | None:  # noqa: ARG002
        """Return this method: it treats each entry alone."""
        return self

    def combine(self, vectors: TaskVectors) -> Tensor | None:
        """Return the sum of the task vectors."""
        return vectors.total()
