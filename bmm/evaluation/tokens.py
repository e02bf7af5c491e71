"""Rows as tokens, and tokens as batches: fixed order, least padding.

Lives here: reading a tokenizer from its folder, `TokenisedRows` with its batches (evaluation and Gram collection
use the same). Does not live here: models (`bmm.evaluation.model`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import transformers
from torch import Tensor

from bmm.errors import CheckpointError, one_line

if TYPE_CHECKING:
    from bmm.kinds.texts import TextRow

# Without one of these, transformers 5 makes up a tokenizer of special tokens alone and every word becomes
# unknown.
_TOKENIZER_FILES = (
    "tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model",
    "spm.model",
)  # fmt: skip


@dataclass(frozen=True)
class TokenisedRows:
    """Token ids of rows, in the order the rows were given, with all that is needed to pad them.

    `columns` maps a model input to one list of integers a row; `padding` to the value that fills it up.
    """

    columns: Mapping[str, Sequence[Sequence[int]]]
    padding: Mapping[str, int]
    side: Literal["left", "right"]

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each row, (rows,)."""
        return [len(ids) for ids in self.columns["input_ids"]]

    @cached_property
    def order(self) -> tuple[int, ...]:
        """Row indices as batches take them: longest first, so that what does not fit memory fails at once."""
        return tuple(sorted(range(len(self)), key=lambda row: (-self.lengths[row], row)))

    def batches(self, batch_size: int) -> Iterator[dict[str, Tensor]]:
        """Yield batches in `order`, each padded to its longest row.

        Every value is (rows, tokens) int64; `attention_mask` is 0 on padding.
        """
        for start in range(0, len(self), batch_size):
            rows = self.order[start : start + batch_size]
            width = self.lengths[rows[0]]
            batch = {}
            for name, column in self.columns.items():
                filled = torch.full((len(rows), width), self.padding[name], dtype=torch.int64)
                for place, row in enumerate(rows):
                    values = torch.tensor(column[row], dtype=torch.int64)
                    if self.side == "left":
                        filled[place, width - len(values) :] = values
                    else:
                        filled[place, : len(values)] = values
                batch[name] = filled
            yield batch


def load_tokenizer(folder: Path, *, padding: bool = True) -> Any:
    """Return the tokenizer in a local folder; nothing is fetched and no code in it is run.

    Raises:
        CheckpointError: there is none, it cannot be read, or it has no padding token where `padding` asks for one.
    """
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise CheckpointError(f"{folder} has no tokenizer; save the one that the model was trained with there")
    try:
        with quiet_transformers():
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False, use_fast=True
            )
    except Exception as error:
        raise CheckpointError(f"the tokenizer in {folder} cannot be read: {one_line(error)}") from error
    if padding and tokenizer.pad_token_id is None:
        raise CheckpointError(f"the tokenizer in {folder} has no padding token; set pad_token and save it again")
    return tokenizer


def tokenised_rows(tokenizer: Any, rows: Sequence[TextRow], max_length: int, refused: Collection[str]) -> TokenisedRows:
    """Return rows as tokens, cut at `max_length`, without the model inputs in `refused`."""
    padding = {
        "input_ids": int(tokenizer.pad_token_id),
        "attention_mask": 0,
        "token_type_ids": int(tokenizer.pad_token_type_id),
    }
    columns: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": []}
    if rows:
        paired = any(row.text_pair is not None for row in rows)
        with quiet_transformers():
            encoded = tokenizer(
                [row.text for row in rows],
                [row.text_pair or "" for row in rows] if paired else None,
                truncation=True,
                max_length=max_length,
                padding=False,
                return_attention_mask=True,
            )
        columns = {name: encoded[name] for name in encoded if name in padding and name not in refused}
    return TokenisedRows(columns=columns, padding=padding, side=tokenizer.padding_side)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep `transformers` from logging inside the block."""
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(level)
