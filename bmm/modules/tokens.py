"""Which rows of a product count: padding left out.

A watch (`bmm.modules.watch`) sees what reached a matrix, and asks here which of its rows are tokens. Only inputs of the
forward pass and shapes are known here; what is done with the rows is the caller's.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


class Tokens:
    """The tokens of one forward pass.

    Args:
        batch: the pass's inputs. `attention_mask` `(examples, tokens)`, and a decoder's, mark what is not padding;
            those of different texts have different lengths. Without them everything counts.
    """

    def __init__(self, batch: Mapping[str, Tensor]) -> None:
        masks = [batch[name] for name in ("attention_mask", "decoder_attention_mask") if name in batch]
        self._masks = [(mask.bool(), bool(mask.all())) for mask in masks]

    def kept(self, tensor: Tensor, *, token_first: bool, routed: Tensor | None) -> Tensor | None:
        """Return the indices of the rows that count, or None for all.

        Args:
            tensor: what reached the matrix, `(..., in)`, as the operator was given it.
            token_first: it has tokens before examples.
            routed: the tokens that may have been picked out for it, by their places; None where none were.
        """
        for mask, full in self._masks:
            places = _places(tensor, mask, token_first, routed)
            if places is not None:
                return None if full else places.nonzero()[:, 0]
        return None


def _places(tensor: Tensor, mask: Tensor, token_first: bool, routed: Tensor | None) -> Tensor | None:
    """Return for each row of a tensor whether it is one of the mask's tokens, or None where they do not fit."""
    if tensor.ndim == 3:
        if tensor.shape[:2] == mask.shape and not token_first:
            return mask.reshape(-1)
        return mask.T.reshape(-1) if tensor.shape[:2] == mask.T.shape else None
    count = tensor.shape[0]
    if routed is not None and len(routed) == count:
        return mask.reshape(-1)[routed]
    if tensor.ndim == 2 and count == mask.numel():
        return (mask.T if token_first else mask).reshape(-1)
    return None
