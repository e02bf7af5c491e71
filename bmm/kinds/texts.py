"""Rows of text, and how a model with a tokenizer reads them.

What becomes of the answers is for the kinds that use these to say.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bmm.digest import canonical_json, digest_text
from bmm.errors import CheckpointError, DataError
from bmm.evaluation.data import Columns
from bmm.evaluation.tokens import TokenisedRows, load_tokenizer, tokenised_rows

_PROBE_TOKENS = 8


@dataclass(frozen=True)
class TextRow:
    """One example: a text or a pair of texts, and its label: a class id, or a number where the task asks for one."""

    text: str
    text_pair: str | None
    label: float

    @cached_property
    def identity(self) -> str:
        """SHA-256 of the texts, white space folded."""
        return digest_text(canonical_json([folded(self.text), folded(self.text_pair)]))

    @property
    def excerpt(self) -> str:
        """The text, white space folded."""
        return folded(self.text) or ""

    def document(self) -> dict[str, Any]:
        """Return the row as plain JSON values."""
        return {"text": self.text, "text_pair": self.text_pair, "label": self.label}


def probe_tokens() -> dict[str, Tensor]:
    """Return a few tokens, for a model whose weights may be anything."""
    tokens = torch.zeros((2, _PROBE_TOKENS), dtype=torch.int64)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def folded(text: str | None) -> str | None:
    """Return a text with each run of white space as one space."""
    return None if text is None else " ".join(text.split())


def check_texts(columns: Columns, key: str) -> None:
    """Refuse a column of texts in which a row has none.

    Raises:
        DataError: naming row and column.
    """
    column = columns.names[key]
    for number, text in zip(columns.numbers, columns.values[key], strict=True):
        if text is None or (isinstance(text, str) and not text.strip()):
            raise DataError(f"{columns.spot}: row {number} has no text in column '{column}'; remove the row")
        if not isinstance(text, str):
            raise DataError(
                f"{columns.spot}: row {number} has a value of type {type(text).__name__} in column '{column}' where "
                "text belongs; name a text column"
            )


def text_rows(columns: Columns, labels: Sequence[float]) -> tuple[TextRow, ...]:
    """Return the rows of the columns `text` and `text_pair`, checked, with their labels.

    Raises:
        DataError: a row without a text.
    """
    texts = columns.values["text"]
    check_texts(columns, "text")
    pairs: Sequence[str | None] = [None] * len(texts)
    if "text_pair" in columns.values:
        check_texts(columns, "text_pair")
        pairs = columns.values["text_pair"]
    return tuple(TextRow(text, pair, label) for text, pair, label in zip(texts, pairs, labels, strict=True))


class TextReader:
    """Makes tokens of texts as one expert was trained to read them.

    Args:
        folder: where the tokenizer's files are.
        max_length: tokens a row; longer rows are cut.
        module: the task's model, which says what inputs and how many positions it has.
        encoder: its encoder.
        task: the expert's name, for messages.

    Raises:
        CheckpointError: the folder has no tokenizer.
    """

    def __init__(self, folder: Path, max_length: int, module: Any, encoder: Any, task: str) -> None:
        self.tokenizer = load_tokenizer(folder)
        self.folder = folder
        self.max_length = max_length
        self._module = module
        self._encoder = encoder
        self._task = task
        # A decoder never looks ahead: behind a row's end padding changes nothing, before its beginning it would, as it
        # would where positions are counted from the first token.
        causal = any(getattr(part, "is_causal", False) for part in encoder.modules())
        counts = causal or _positions(encoder) is not None
        self.side: Literal["left", "right"] = "right" if counts else self.tokenizer.padding_side
        if causal:
            # By it such a classifier finds each row's last token; many a decoder's configuration has none.
            module.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id

    def prepare(self, rows: Sequence[TextRow]) -> TokenisedRows:
        """Return the rows as tokens, cut at `max_length`, sorted by length for batching.

        Raises:
            DataError: a row becomes no tokens, or more than the model has positions for.
            CheckpointError: the tokenizer has tokens that the model does not.
        """
        tokenised = replace(tokenised_rows(self.tokenizer, rows, self.max_length, self.refused()), side=self.side)
        self.check(tokenised, [row.text for row in rows])
        return tokenised

    def refused(self) -> set[str]:
        """Return the inputs that tokenizers make and this model does not take."""
        accepted = inspect.signature(self._module.forward).parameters
        types = getattr(self._module.config, "type_vocab_size", 2)
        # A model of one token type assumes it when told nothing, and fails when told of a second one.
        return {"token_type_ids"} if "token_type_ids" not in accepted or types < 2 else set()

    def check(self, tokenised: TokenisedRows, texts: Sequence[str]) -> None:
        """Refuse rows that the model could not take; `texts` are theirs, for messages.

        Raises:
            DataError: a row becomes no tokens, or more than the model has positions for.
            CheckpointError: the tokenizer has tokens that the model does not.
        """
        if not len(tokenised):
            return
        lengths = tokenised.lengths
        if min(lengths) == 0:
            text = texts[lengths.index(0)]
            raise DataError(f"{self._task}: the tokenizer in {self.folder} makes no token of the text {text[:60]!r}")
        positions = _positions(self._encoder)
        if positions is not None and max(lengths) > positions:
            raise DataError(
                f"{self._task}: a row has {max(lengths)} tokens, but the model has {positions} positions; "
                f"set task.max_length to at most {positions}"
            )
        self._check_ends(tokenised, texts)
        vocabulary = self._encoder.get_input_embeddings().num_embeddings
        largest = max(max(ids) for ids in tokenised.columns["input_ids"])
        if largest >= vocabulary:
            raise CheckpointError(
                f"{self._task}: the tokenizer in {self.folder} gives the token {largest}, but the model has "
                f"only {vocabulary} tokens; use the tokenizer that the model was trained with"
            )

    def _check_ends(self, tokenised: TokenisedRows, texts: Sequence[str]) -> None:
        """Refuse rows without the one end by which encoder-decoders (T5, BART) know what to classify."""
        config = self._module.config
        if not config.is_encoder_decoder or not type(self._module).__name__.endswith("ForSequenceClassification"):
            return
        for ids, text in zip(tokenised.columns["input_ids"], texts, strict=True):
            if list(ids).count(config.eos_token_id) != 1:
                raise CheckpointError(
                    f"{self._task}: the tokenizer in {self.folder} does not end the text {text[:60]!r} with the "
                    f"model's eos_token_id {config.eos_token_id}, once; use the tokenizer that it was trained with"
                )


def _positions(encoder: nn.Module) -> int | None:
    """Return how many tokens a learned position table has room for, or None without one.

    Position tables with a padding index (RoBERTa) count from the place after it.
    """
    rooms = [
        table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
        for name, table in encoder.named_modules()
        if name.endswith(("position_embeddings", "wpe")) and isinstance(table, nn.Embedding)
    ]
    return min(rooms, default=None)
