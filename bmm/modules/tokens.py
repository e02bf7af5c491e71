"""Which rows of a product count: padding left out, or a sample of each sequence's tokens.

A watch (`bmm.modules.watch`) sees what reached a matrix, and asks here which of its rows are tokens. Only inputs of the
forward pass and shapes are known here; what is done with the rows is the caller's.

A sample is drawn once for each pass and length of sequence, from its seed and the pass's place among others alone: all
layers see the same tokens, whoever runs them, in whatever order, and so do two models that run the same batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bmm.digest import digest_json

_TEXTS = {"attention_mask": "input_ids", "decoder_attention_mask": "decoder_input_ids"}
"""A text's padding mask -> its tokens, among the inputs of a forward pass."""
# Of a digest, as many hexadecimal digits as make a seed that every generator takes.
_SEED_DIGITS = 15


@dataclass(frozen=True)
class Sample:
    """At most so many tokens of each sequence, drawn at random without replacement among those that are not padding.

    Attributes:
        tokens: of a sequence, at most.
        tokens_seed: of the draw.
        first_row: of the rows that are run, the place of the first; other rows have draws of their own.
    """

    tokens: int
    tokens_seed: int = 0
    first_row: int = 0

    @classmethod
    def of(cls, settings: Mapping[str, Any], first_row: int = 0) -> Sample | None:
        """Return what settings say by the names that a recipe has for it; None where they keep all tokens."""
        if settings.get("tokens") is None:
            return None
        return cls(settings["tokens"], settings["tokens_seed"], first_row)

    def drawn(self, mask: Tensor, place: int) -> Tensor:
        """Return the part of a mask `(sequences, tokens)`, true where a token may be drawn, that is drawn.

        Args:
            mask: a sequence with no more true places than are to be drawn is returned as it is.
            place: of the batch among the rows' batches.
        """
        said = [self.tokens_seed, self.first_row, place, mask.shape[1]]
        generator = torch.Generator().manual_seed(int(digest_json(said)[:_SEED_DIGITS], 16))
        keys = torch.rand(mask.shape, dtype=torch.float64, generator=generator)
        # Those that may not be drawn come last; where too few are left, they are taken out again.
        first = keys.masked_fill(~mask.cpu(), -1).topk(min(self.tokens, mask.shape[1]), dim=1).indices
        chosen = torch.zeros(mask.shape, dtype=torch.bool).scatter_(1, first, value=True)
        return chosen.to(mask.device) & mask


@dataclass(frozen=True)
class Routed:
    """Tokens that were picked out for an expert of a mixture: their `places` among so many in all."""

    places: Tensor
    among: int


class Tokens:
    """The tokens of one forward pass.

    Args:
        batch: the pass's inputs, examples first. `attention_mask` `(examples, tokens)`, and a decoder's, mark what is
            not padding; those of different texts have different lengths. Without them everything counts.
        sample: counts alone, if given: of texts in what has a row for each token, and of everything else (patches of
            images, frames of sounds) in what has several rows for each example, those of one beside each other.
        place: of the batch among the batches that `sample` is drawn of.
    """

    def __init__(self, batch: Mapping[str, Tensor], sample: Sample | None = None, place: int = 0) -> None:
        masks = {name: batch[name].bool() for name in _TEXTS if name in batch}
        self._sample = sample
        self._place = place
        self._examples = 0
        if sample is not None:
            texts = {mask: batch[ids] for mask, ids in _TEXTS.items() if ids in batch}
            # A table of positions is no sequence, although it may look like one; of a text the length is known.
            self._examples = 0 if texts else len(next(iter(batch.values())))
            masks = {name: torch.ones_like(ids, dtype=torch.bool) for name, ids in texts.items()} | masks
            masks = {name: sample.drawn(masks[name], place) for name in _TEXTS if name in masks}
        self._masks = [(mask, bool(mask.all())) for mask in masks.values()]
        self._own: dict[int, Tensor] = {}

    def kept(self, tensor: Tensor, *, token_first: bool = False, routed: Routed | None = None) -> Tensor | None:
        """Return the indices of the rows that count, or None for all.

        Args:
            tensor: what reached the matrix, `(..., in)`, as the operator was given it.
            token_first: it has tokens before examples.
            routed: the tokens that may have been picked out for it; None where none were.
        """
        if routed is not None and (tensor.ndim != 2 or len(routed.places) != tensor.shape[0]):
            routed = None
        for mask, full in self._masks:
            places = _places(tensor, mask, token_first, routed)
            if places is not None:
                return None if full else places.nonzero()[:, 0]
        drawn = self._unmarked(tensor, token_first, routed)
        if drawn is None:
            return None
        places = (drawn.T if token_first else drawn).reshape(-1)
        return (places if routed is None else places[routed.places]).nonzero()[:, 0]

    def _unmarked(self, tensor: Tensor, token_first: bool, routed: Routed | None) -> Tensor | None:
        """Return which of the rows that no mask tells of are drawn, `(examples, rows of each)`; None for all."""
        if self._sample is None or not self._examples:
            return None
        axis = 1 if token_first and tensor.ndim == 3 else 0
        outer, rows = tensor.shape[axis], math.prod(tensor.shape[:-1])
        if routed is not None:
            outer = rows = routed.among
        each, left = divmod(rows, self._examples)
        if left or outer % self._examples or each <= self._sample.tokens:
            return None
        if each not in self._own:
            every = torch.ones(self._examples, each, dtype=torch.bool, device=tensor.device)
            self._own[each] = self._sample.drawn(every, self._place)
        return self._own[each]


def _places(tensor: Tensor, mask: Tensor, token_first: bool, routed: Routed | None) -> Tensor | None:
    """Return for each row of a tensor whether it is one of the mask's tokens, or None where they do not fit."""
    if tensor.ndim == 3:
        if tensor.shape[:2] == mask.shape and not token_first:
            return mask.reshape(-1)
        return mask.T.reshape(-1) if tensor.shape[:2] == mask.T.shape else None
    if routed is not None:
        return mask.reshape(-1)[routed.places]
    if tensor.ndim == 2 and tensor.shape[0] == mask.numel():
        return (mask.T if token_first else mask).reshape(-1)
    return None
