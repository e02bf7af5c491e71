"""Task vectors of one tensor, and the frame that every method built on them shares. No method lives here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from bmm.anchors.interface import Merged, Treatment, Weights
from bmm.errors import BMMError, CheckpointError


class TaskVectors:
    """The task vectors `τ_t = W_t − W_0` of one tensor, float64, one expert in memory at a time.

    Iterating reads the experts afresh and leaves out those that equal the base: they carry nothing, and
    have no direction for a method to normalise.
    """

    def __init__(self, name: str, weights: Weights) -> None:
        self.name = name
        self.count = weights.count
        self.base = checked(weights.base(name), name, "the base model").to(torch.float64)
        self._weights = weights

    def at(self, index: int) -> Tensor:
        """Return one expert's task vector, zero or not.

        Raises:
            CheckpointError: the tensor holds NaN or infinities, or has another shape than the base's.
        """
        owner = f"expert {index + 1} of {self.count}"
        tensor = checked(self._weights.expert(index, self.name), self.name, owner)
        require_shape(tensor, self.base, self.name, owner)
        return tensor.to(torch.float64) - self.base

    def __iter__(self) -> Iterator[Tensor]:
        for index in range(self.count):
            vector = self.at(index)
            if bool(vector.any()):
                yield vector

    def total(self) -> Tensor | None:
        """Return `Σ τ_t`, or None where every expert equals the base."""
        total: Tensor | None = None
        for vector in self:
            total = vector if total is None else total.add_(vector)
        return total

    def mean(self) -> Tensor | None:
        """Return `Σ τ_t / T` over all `T` experts, or None where every expert equals the base."""
        total = self.total()
        return None if total is None else total / self.count


class ScaledAnchor(ABC):
    """A method whose result is `W_0 + scale · direction`, tensor by tensor, with one scale for all of them."""

    @property
    def scale(self) -> float:
        """What the direction is multiplied by; 1 for a method without such a setting."""
        return 1.0

    def prepare(self, weights: Weights) -> None:  # noqa: B027 - most methods need no first pass
        """Look at all tensors once; most methods need nothing."""

    @abstractmethod
    def direction(self, name: str, weights: Weights) -> tuple[Tensor | None, Treatment]:
        """Return one floating-point tensor's direction (float64, None if every expert equals it), and its treatment.

        Raises:
            CheckpointError: a tensor holds NaN or infinities, or has another shape than the base's.
        """

    def merge(self, name: str, weights: Weights) -> Merged:
        """Merge one tensor: `W_0 + scale · direction`, or the base's tensor where there is nothing to merge.

        Raises:
            CheckpointError: a tensor holds NaN or infinities, or has another shape than the base's.
        """
        base = weights.base(name)
        if not base.is_floating_point():
            return Merged(base.clone(), "copied")
        direction, treatment = self.direction(name, weights)
        if direction is None:
            return Merged(base.to(torch.float32, copy=True), "copied")
        return Merged((base.to(torch.float64) + self.scale * direction).to(torch.float32), treatment)


class TaskVectorAnchor(ScaledAnchor):
    """A method whose direction of one tensor is some combination of that tensor's task vectors."""

    def direction(self, name: str, weights: Weights) -> tuple[Tensor | None, Treatment]:
        """Return the combination of the task vectors; see `ScaledAnchor.direction`."""
        vectors = TaskVectors(name, weights)
        return self.combine(vectors, linear=vectors.base.ndim == 2 and weights.is_linear(name))

    @abstractmethod
    def combine(self, vectors: TaskVectors, *, linear: bool) -> tuple[Tensor | None, Treatment]:
        """Return the direction, before any scale (float64, None if every expert equals the base), and its treatment."""


def number(scale: float | Literal["validation"]) -> float:
    """Return a scale that is one.

    Raises:
        BMMError: it has yet to be chosen on the validation rows.
    """
    if isinstance(scale, str):
        raise BMMError("a scale that has yet to be chosen on the validation rows was asked for")
    return scale


def checked(tensor: Tensor, name: str, owner: str) -> Tensor:
    """Return `tensor` as it is.

    Raises:
        CheckpointError: it holds NaN or infinities.
    """
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"'{name}' of {owner} holds NaN or infinite values; save that model again")
    return tensor


def require_shape(tensor: Tensor, base: Tensor, name: str, owner: str) -> None:
    """Refuse a tensor whose shape is not the base's.

    Raises:
        CheckpointError: the shapes differ.
    """
    if tensor.shape != base.shape:
        raise CheckpointError(
            f"'{name}' of {owner} has shape {tuple(tensor.shape)} and the base model's {tuple(base.shape)}; "
            "use models of one architecture"
        )
