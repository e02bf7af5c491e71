"""Leaving padding out of what flows through a module."""

from __future__ import annotations

from torch import Tensor


def unpadded(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """Return the rows `(rows, width)` of a module's input or output that are not padding.

    Args:
        tensor: `(examples, tokens, width)`, or `(examples, width)` where each example is one row (a pooler).
        mask: `(examples, tokens)`, true where a token is not padding; None without padding.
    """
    if mask is not None and tensor.ndim == 3 and tensor.shape[:2] == mask.shape:
        return tensor[mask.bool()]
    return tensor.reshape(-1, tensor.shape[-1])
