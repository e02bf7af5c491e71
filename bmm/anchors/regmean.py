"""RegMean as an anchor: linear maps by the regression without a prior, the rest averaged (arXiv 2212.09849).

    W = (Σ_t W_t G̃_t)(Σ_t G̃_t)⁻¹        G̃_t = a G_t + (1 − a) diag(G_t)

The closed form, and what it does where `Σ G̃_t` is singular, is `bmm.regression.regmean`. It is solved for the task
vectors, which is the same: a weight that all experts have comes out of the regression as it went in. The published
code counts padding rows into its Grams and inverts in the models' own precision; ours leave them out, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import overload

from torch import Tensor

from bmm.anchors.settings import RegMeanSettings
from bmm.anchors.task_vectors import LinearMapAnchor, TaskVectors
from bmm.regression.regmean import regmean


class RegMean(LinearMapAnchor):
    """Merges linear maps by the experts' Gram matrices and averages the rest.

    Args:
        settings: how much of the off-diagonal entries is kept.
        gram: gives expert `t`'s Gram matrix `(in, in)` by (t, name of the linear map).
    """

    def __init__(self, settings: RegMeanSettings, gram: Callable[[int, str], Tensor]) -> None:
        self.settings = settings
        self._gram = gram

    def combine(self, vectors: TaskVectors) -> Tensor | None:
        """Return the regression of the task vectors."""
        if vectors.total() is None:
            return None
        experts = _Read(vectors.count, vectors.at)
        grams = _Read(vectors.count, lambda index: self._gram(index, vectors.map))
        return regmean(experts, grams, alpha=self.settings.off_diagonal, where=vectors.map)


class _Read(Sequence[Tensor]):
    """Tensors by number, each read when it is asked for."""

    def __init__(self, count: int, read: Callable[[int], Tensor]) -> None:
        self._count = count
        self._read = read

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...

    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(index, slice):
            return [self._read(place) for place in range(*index.indices(self._count))]
        if not 0 <= index < self._count:
            raise IndexError(index)
        return self._read(index)
