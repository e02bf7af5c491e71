"""Task vectors of one tensor, and the frame that every method built on them shares. No method lives here."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from bmm.anchors.interface import Matrix, Merged, Treatment, Weights
from bmm.errors import BMMError, CheckpointError


class TaskVectors:
    """The task vectors `τ_t = W_t − W_0` of one tensor or of one matrix in it, float64, an expert in memory at a time.

    Iterating reads the experts afresh and leaves out those that equal the base: they carry nothing, and
    have no direction for a method to normalise.

    Args:
        name: the tensor.
        weights: base and experts.
        matrix: which part of it; None for all.
    """

    def __init__(self, name: str, weights: Weights, matrix: Matrix | None = None) -> None:
        self.name = name
        self.count = weights.count
        self._weights = weights
        self._matrix = matrix
        self.base = self._values(self._part(weights.base(name)), "the base model")

    @property
    def map(self) -> str:
        """Name of the linear map, or of the tensor where that is taken whole."""
        return self.name if self._matrix is None else self._matrix.module

    def at(self, index: int) -> Tensor:
        """Return one expert's task vector, zero or not.

        Raises:
            CheckpointError: the tensor holds NaN or infinities, or has another shape than the base's.
        """
        return self._values(self._stored(index), self._owner(index)).sub_(self.base)

    def __iter__(self) -> Iterator[Tensor]:
        for index in range(self.count):
            vector = self._changed(index)
            if vector is not None:
                yield vector

    def _changed(self, index: int) -> Tensor | None:
        """Return one expert's task vector, None if it is zero."""
        stored, base = self._stored(index), self._part(self._weights.base(self.name))
        alike = stored.dtype == base.dtype
        # Entries as they are stored are compared several times as fast as differences are looked through, and mostly
        # the first ones differ. Entries of two dtypes may be equal all the same.
        if alike and torch.equal(stored, base):
            return None
        vector = self._values(stored, self._owner(index)).sub_(self.base)
        return vector if alike or bool(vector.any()) else None

    def _owner(self, index: int) -> str:
        return f"expert {index + 1} of {self.count}"

    def _stored(self, index: int) -> Tensor:
        tensor = self._weights.expert(index, self.name)
        require_shape(tensor, self._weights.base(self.name), self.name, self._owner(index))
        return self._part(tensor)

    def _part(self, tensor: Tensor) -> Tensor:
        return tensor if self._matrix is None else self._matrix.part(tensor)

    def _values(self, part: Tensor, owner: str) -> Tensor:
        """Return a copy of finite entries, float64."""
        values = part.to(torch.float64, copy=True)
        # A finite sum has finite terms, and is found in one pass.
        if not math.isfinite(float(values.sum())):
            checked(part, self.name, owner)
        return values

    def total(self) -> Tensor | None:
        """Return `Σ τ_t`, or None where every expert equals the base."""
        total: Tensor | None = None
        for vector in self:
            total = vector if total is None else total.add_(vector)
        return total

    def mean(self) -> Tensor | None:
        """Return `Σ τ_t / T` over all `T` experts, or None where every expert equals the base."""
        total = self.total()
        return None if total is None else total.div_(self.count)


class ScaledAnchor(ABC):
    """A method whose result is `W_0 + scale · direction`, tensor by tensor, with one scale for all of them."""

    @property
    def scale(self) -> float:
        """What the direction is multiplied by; 1 for a method without such a setting."""
        return 1.0

    def prepare(self, weights: Weights) -> None:  # noqa: B027 - most methods need no first pass
        """Look at all tensors once; most methods need nothing."""

    def piecewise(self, name: str, weights: Weights) -> ScaledAnchor | None:  # noqa: ARG002
        """Return a method that merges any piece of this tensor as this one does the whole; None if there is none.

        Most methods look at a tensor as a whole.
        """
        return None

    @abstractmethod
    def direction(self, name: str, weights: Weights) -> tuple[Tensor | None, Treatment]:
        """Return one floating-point tensor's direction (float64, None if every expert equals it), and its treatment.

        The tensor is the caller's: it is a new one each time.

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
        return Merged(direction.mul_(self.scale).add_(base.to(torch.float64)).to(torch.float32), treatment)


class TaskVectorAnchor(ScaledAnchor):
    """A method whose direction of one tensor is some combination of that tensor's task vectors, whatever it is."""

    treatment: Treatment = "anchored"

    def direction(self, name: str, weights: Weights) -> tuple[Tensor | None, Treatment]:
        """Return the combination of the task vectors; see `ScaledAnchor.direction`."""
        return self.combine(TaskVectors(name, weights)), self.treatment

    @abstractmethod
    def combine(self, vectors: TaskVectors) -> Tensor | None:
        """Return the direction, before any scale, float64, or None if every expert equals the base."""


class LinearMapAnchor(ScaledAnchor):
    """A method with a rule for linear maps, matrix by matrix; everything else gets the mean of the task vectors."""

    def piecewise(self, name: str, weights: Weights) -> ScaledAnchor | None:
        """Return this method for a tensor without a linear map: the mean is one of entries."""
        return None if weights.maps(name) else self

    def direction(self, name: str, weights: Weights) -> tuple[Tensor | None, Treatment]:
        """Return the tensor with each of its matrices merged; see `ScaledAnchor.direction`."""
        maps = weights.maps(name)
        whole = TaskVectors(name, weights)
        if not maps:
            return whole.mean(), "averaged"
        covered = sum(map_.part(whole.base).numel() for map_ in maps)
        direction = None if covered == whole.base.numel() else whole.mean()
        for map_ in maps:
            merged = self.combine(TaskVectors(name, weights, map_))
            if merged is not None:
                direction = torch.zeros_like(whole.base) if direction is None else direction
                map_.part(direction).copy_(merged)
        return direction, "anchored"

    @abstractmethod
    def combine(self, vectors: TaskVectors) -> Tensor | None:
        """Return a matrix's direction `(out, in)` before any scale, float64, or None if no expert changed it."""


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
