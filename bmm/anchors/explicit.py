"""Any checkpoint of the same architecture as the anchor: its tensors are taken as they are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bmm.anchors.interface import Merged, Weights
from bmm.anchors.settings import CheckpointAnchorSettings
from bmm.anchors.task_vectors import checked, require_shape
from bmm.errors import CheckpointError


class Explicit:
    """Takes every floating-point tensor from a reader, even where all experts equal the base."""

    def __init__(self, settings: CheckpointAnchorSettings, reader: Callable[[str], Tensor]) -> None:
        self.settings = settings
        self._read = reader

    def prepare(self, weights: Weights) -> None:
        """Do nothing: tensors are checked as they are read."""

    def merge(self, name: str, weights: Weights) -> Merged:
        """Return the checkpoint's tensor; the base's where that is not floating point.

        Raises:
            CheckpointError: the checkpoint lacks the tensor (its reader raises KeyError), or holds one of
                another shape, one that is not floating point, or one with NaN or infinities.
        """
        base = weights.base(name)
        if not base.is_floating_point():
            return Merged(base.clone(), "copied")
        owner = f"the anchor checkpoint {self.settings.path}"
        try:
            tensor = self._read(name)
        except KeyError:
            raise CheckpointError(f"{owner} has no tensor '{name}'; use a model of the same architecture") from None
        if not tensor.is_floating_point():
            raise CheckpointError(f"'{name}' of {owner} has dtype {tensor.dtype}; use a floating-point checkpoint")
        require_shape(tensor, base, name, owner)
        return Merged(checked(tensor, name, owner).to(torch.float32, copy=True), "anchored")
