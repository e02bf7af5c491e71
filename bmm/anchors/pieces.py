"""Merging a large tensor a piece at a time, by methods that decide on each entry alone: in the memory of the pieces.

Most methods read a tensor as float64, several times over; of an embedding table that is gigabytes, and slower than the
processor's caches. The same numbers come out, to the last bit, whatever the size of a piece. What is a method's own
business, that it can do this, is `ScaledAnchor.piecewise`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bmm.anchors.interface import Anchor, Matrix, Treatment, Weights
from bmm.anchors.task_vectors import ScaledAnchor, require_shape

ENTRIES = 1 << 17
"""In one piece: 1 MB as float64, which stays in a core's cache (measured best between 2^15 and 2^20)."""


def merge_tensor(method: Anchor, name: str, weights: Weights, dtype: torch.dtype) -> tuple[Tensor, Treatment]:
    """Return one merged tensor in `dtype` (one that is not floating point in its own), and what was done to it.

    Raises:
        CheckpointError: a tensor holds NaN or infinities, or has another shape than the base's.
    """
    base = weights.base(name)
    if not base.is_floating_point() or base.numel() <= ENTRIES:
        merged = method.merge(name, weights)
        return merged.tensor.to(dtype), merged.treatment
    by_entry = method.piecewise(name, weights) if isinstance(method, ScaledAnchor) else None
    if by_entry is None:
        merged = method.merge(name, weights)
        return merged.tensor.to(dtype), merged.treatment
    found = torch.empty(base.shape, dtype=dtype)
    flat = found.view(-1)
    treatments: set[Treatment] = set()
    for piece in pieces(name, weights):
        merged = by_entry.merge(name, piece)
        flat[piece.start : piece.start + merged.tensor.numel()] = merged.tensor
        treatments.add(merged.treatment)
    # Where only some pieces equal the base, the tensor as a whole was merged.
    treatments -= {"copied"} if len(treatments) > 1 else set()
    return found, treatments.pop()


def pieces(name: str, weights: Weights) -> list[Piece]:
    """Cut one tensor of the base and of all experts into pieces, flat, in order.

    Raises:
        CheckpointError: an expert's has another shape than the base's.
    """
    base = weights.base(name)
    experts = [weights.expert(index, name) for index in range(weights.count)]
    for index, expert in enumerate(experts):
        require_shape(expert, base, name, f"expert {index + 1} of {weights.count}")
    flat = [expert.reshape(-1) for expert in experts]
    return [Piece(name, base.reshape(-1), flat, start) for start in range(0, base.numel(), ENTRIES)]


class Piece:
    """A piece of one tensor, as `Weights`: some of its entries, in a row."""

    def __init__(self, name: str, base: Tensor, experts: Sequence[Tensor], start: int) -> None:
        self.start = start
        self._name = name
        self._base = base
        self._experts = experts

    @property
    def count(self) -> int:
        """Number of experts."""
        return len(self._experts)

    def names(self) -> tuple[str, ...]:
        """Return the one name."""
        return (self._name,)

    def base(self, name: str) -> Tensor:  # noqa: ARG002
        """Return the base's entries, flat."""
        return self._base[self.start : self.start + ENTRIES]

    def expert(self, index: int, name: str) -> Tensor:  # noqa: ARG002
        """Return one expert's entries, flat."""
        return self._experts[index][self.start : self.start + ENTRIES]

    def maps(self, name: str) -> Sequence[Matrix]:  # noqa: ARG002
        """Return nothing: no matrix is whole here."""
        return ()
