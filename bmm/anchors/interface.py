"""The contract of an anchor method: what it reads (`Weights`, `Sources`) and returns (`Merged`).

No method lives here, and no checkpoint is opened here: whoever calls decides where tensors come from, and
which parameters hold linear maps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

Treatment = Literal["anchored", "averaged", "copied"]


class Matrix(Protocol):
    """One linear map's matrix, wherever in a parameter it lies."""

    @property
    def module(self) -> str:
        """The map's own name."""

    def part(self, parameter: Tensor) -> Tensor:
        """Return the matrix `(out, in)` as a view of its parameter."""


class Weights(Protocol):
    """The parameters that a base and all its experts share, read one tensor at a time."""

    @property
    def count(self) -> int:
        """Number of experts."""

    def names(self) -> tuple[str, ...]:
        """Return the canonical names, in one fixed order."""

    def base(self, name: str) -> Tensor:
        """Return the base model's tensor, in its stored dtype."""

    def expert(self, index: int, name: str) -> Tensor:
        """Return one expert's tensor, in its stored dtype and of the base's shape."""

    def maps(self, name: str) -> Sequence[Matrix]:
        """Return the linear maps whose matrices the tensor holds; none for a bias, a norm or an embedding."""


@dataclass(frozen=True)
class Sources:
    """What a method may need besides weights, each read one tensor at a time; None where it is not to be had.

    Which of them a method needs is said by its settings (`bmm.anchors.settings`).

    Args:
        checkpoint: gives the anchor checkpoint's tensor of a canonical name.
        gram: gives expert `t`'s Gram matrix `(in, in)`, float64, by (t, name of a linear map).
        fisher: gives expert `t`'s diagonal Fisher information, of the parameter's shape, by (t, canonical name).
    """

    checkpoint: Callable[[str], Tensor] | None = None
    gram: Callable[[int, str], Tensor] | None = None
    fisher: Callable[[int, str], Tensor] | None = None


@dataclass(frozen=True)
class Merged:
    """One merged tensor and what was done to get it.

    `tensor` has the base's shape and is float32, except where the base's tensor is not floating point: that
    one keeps its dtype. `treatment` is "anchored" (the method's own rule), "averaged" (the mean of the task
    vectors) or "copied" (the base's tensor: not floating point, or the same in every expert).
    """

    tensor: Tensor
    treatment: Treatment


class Anchor(Protocol):
    """A method that merges tensor by tensor."""

    def prepare(self, weights: Weights) -> None:
        """Find what spans all tensors, where the method needs that; call it before `merge`."""

    def merge(self, name: str, weights: Weights) -> Merged:
        """Merge one tensor.

        Raises:
            CheckpointError: a tensor holds NaN or infinities, or has another shape than the base's.
        """
