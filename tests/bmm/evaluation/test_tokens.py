"""Tokenizer folders, tokens and batches."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from bmm.errors import CheckpointError
from bmm.evaluation.tokens import TokenisedRows, load_tokenizer, tokenised_rows
from bmm.kinds.texts import TextRow as Row

PADDING = {"input_ids": 9, "attention_mask": 0, "token_type_ids": 0}


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 12), max_size=20), st.integers(1, 6), st.sampled_from(["left", "right"]))
def test_batches_hold_every_row_once_with_least_padding(lengths: list[int], size: int, side: str) -> None:
    ids = [[100 * row + place for place in range(length)] for row, length in enumerate(lengths)]
    columns = {"input_ids": ids, "attention_mask": [[1] * length for length in lengths]}
    tokenised = TokenisedRows(columns=columns, padding=PADDING, side=side)  # type: ignore[arg-type]
    assert sorted(tokenised.order) == list(range(len(lengths)))
    seen = []
    widths = []
    for batch in tokenised.batches(size):
        assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64
        assert batch["attention_mask"].sum(1).max() == batch["input_ids"].shape[1]
        widths.append(batch["input_ids"].shape[1])
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            seen.append(row[mask.bool()].tolist())
            assert (row[~mask.bool()] == 9).all()
            assert mask[-1 if side == "left" else 0] == 1
    assert seen == [ids[row] for row in tokenised.order]
    assert widths == sorted(widths, reverse=True)
    assert len(widths) == -(-len(lengths) // size)


def test_rows_of_equal_length_keep_their_order() -> None:
    columns = {"input_ids": [[1, 2], [3], [4, 5], [6]], "attention_mask": [[1, 1], [1], [1, 1], [1]]}
    assert TokenisedRows(columns=columns, padding=PADDING, side="right").order == (0, 2, 1, 3)


def test_rows_are_cut_and_not_padded(tokenizer_folder: Callable[..., Path]) -> None:
    tokenizer = load_tokenizer(tokenizer_folder())
    rows = [Row("w0 w1", None, 0), Row(" ".join(["w2"] * 30), None, 0)]
    tokenised = tokenised_rows(tokenizer, rows, 8, set())
    assert tokenised.columns["input_ids"][0] == [2, 4, 5, 3]
    assert tokenised.lengths == [4, 8]
    pairs = tokenised_rows(tokenizer, [Row("w0", "w1 w2", 0)], 8, set())
    assert pairs.columns["input_ids"] == [[2, 4, 3, 5, 6, 3]]
    assert pairs.columns["token_type_ids"] == [[0, 0, 0, 1, 1, 1]]
    assert "token_type_ids" not in tokenised_rows(tokenizer, rows, 8, {"token_type_ids"}).columns
    assert len(tokenised_rows(tokenizer, [], 8, set())) == 0


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    # transformers makes up a tokenizer of five tokens for this folder.
    transformers.BertConfig().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=f"^{tmp_path} has no tokenizer; save"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_cannot_be_read(tokenizer_folder: Callable[..., Path]) -> None:
    folder = tokenizer_folder()
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=f"the tokenizer in {folder} cannot be read: ") as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_padding(tokenizer_folder: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match="has no padding token; set pad_token"):
        load_tokenizer(tokenizer_folder(pad=False))


def test_code_in_the_folder_is_not_run(tokenizer_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder, trace = tokenizer_folder(), tmp_path / "trace"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": [None, "own.Own"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(trace)!r}, 'w').close()\nclass Own: pass\n")
    with suppress(CheckpointError):
        load_tokenizer(folder)
    assert not trace.exists()
