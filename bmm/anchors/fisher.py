"""Fisher-weighted averaging (Matena & Raffel, arXiv 2111.09832), on every floating-point tensor.

Entry by entry, with `F_t` expert `t`'s diagonal Fisher information on its own calibration rows:

    W = Σ_t w_t ⊙ W_t / Σ_t w_t        w_t = (F_t + floor) / (‖F_t‖ + floor)

`‖F_t‖` is the norm over all parameters, so that no expert wins because its gradients are large everywhere; without
`normalize` it is left out. This is the merge of the code that the field uses (MergeLM, fusion-bench). Its *estimate*
of `F_t` is another matter: it squares the gradient of `Σ √p · log p`, summed over the classes and rows of a batch,
which is not the Fisher information; `bmm.evaluation.fisher` squares row by row, as published.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bmm.anchors.interface import Weights
from bmm.anchors.settings import FisherSettings
from bmm.anchors.task_vectors import TaskVectorAnchor, TaskVectors
from bmm.errors import BMMError
from bmm.progress import progress


class Fisher(TaskVectorAnchor):
    """Averages every tensor with the experts' Fisher information as weights; needs `prepare` first.

    Args:
        settings: the floor, and whether experts are brought to one norm.
        fisher: gives expert `t`'s diagonal Fisher information by (t, canonical name).
    """

    def __init__(self, settings: FisherSettings, fisher: Callable[[int, str], Tensor]) -> None:
        self.settings = settings
        self._fisher = fisher
        self._norms: tuple[float, ...] | None = None

    def prepare(self, weights: Weights) -> None:
        """Measure every expert's Fisher information over all parameters."""
        names = [name for name in weights.names() if weights.base(name).is_floating_point()]
        norms = []
        with progress("Measuring the Fisher information", weights.count * len(names)) as bar:
            for index in range(weights.count):
                squares = 0.0
                for name in names:
                    squares += float(self._fisher(index, name).to(torch.float64).square().sum())
                    bar.advance()
                norms.append(squares**0.5)
        self._norms = tuple(norms)

    def combine(self, vectors: TaskVectors) -> Tensor | None:
        """Return the weighted mean of the task vectors.

        Raises:
            BMMError: `prepare` was not called, or an expert's Fisher information is not finite or not of the shape.
        """
        if self._norms is None:
            raise BMMError("Fisher averaging was asked to merge before prepare")
        floor = self.settings.floor
        total, weight = torch.zeros_like(vectors.base), torch.zeros_like(vectors.base)
        changed = False
        for index, norm in enumerate(self._norms):
            vector = vectors.at(index)
            changed = changed or bool(vector.any())
            own = self._fisher(index, vectors.name).to(torch.float64) + floor
            if own.shape != vector.shape or not bool(torch.isfinite(own).all()):
                raise BMMError(f"the Fisher information of '{vectors.name}' is not finite or has another shape")
            if self.settings.normalize:
                own /= norm + floor
            total += own * vector
            weight += own
        return total / weight if changed else None
