"""DARE on a mask that somebody else drew, so that what is done with a mask can be compared."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bmm.anchors.dare import Thinned


@dataclass(frozen=True)
class Drawn(Thinned):
    """Experts thinned by one given mask, instead of one drawn from a seed."""

    drawn: torch.Tensor

    def mask(self, index: int, name: str, shape: torch.Size) -> torch.Tensor:  # noqa: ARG002
        """Return the given mask."""
        return self.drawn
