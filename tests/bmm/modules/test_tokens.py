"""Which rows count: every one has a name of its own here, so that it is seen which were kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bmm.modules.tokens import Routed, Sample, Tokens

MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]])
TEXT = {"input_ids": torch.zeros_like(MASK), "attention_mask": MASK}
IMAGES = {"pixel_values": torch.zeros(3, 3, 8, 8)}


def named(examples: int, length: int) -> Tensor:
    """Return rows `(examples, length, 1)` of which each says whose it is: 100 times the example, and the token."""
    return (100.0 * torch.arange(examples)[:, None] + torch.arange(length))[..., None]


def names(tokens: Tokens, tensor: Tensor, **said: Any) -> list[int]:
    keep = tokens.kept(tensor, **said)
    rows = tensor.reshape(-1)
    return sorted(int(name) for name in (rows if keep is None else rows[keep]))


def counts(kept: list[int], examples: int = 3) -> list[int]:
    return [sum(name // 100 == example for name in kept) for example in range(examples)]


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    left=st.booleans(),
    tokens=st.integers(1, 12),
    seed=st.integers(0, 2**63),
    place=st.integers(0, 99),
)
@settings(deadline=None, max_examples=25)
def test_of_each_sequence_as_many_are_drawn_as_there_are_and_never_padding(
    lengths: list[int], left: bool, tokens: int, seed: int, place: int
) -> None:
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    mask = mask.flip(1) if left else mask
    drawn = Sample(tokens, seed).drawn(mask, place)
    assert not bool((drawn & ~mask).any())
    assert drawn.sum(1).tolist() == [min(tokens, length) for length in lengths]
    torch.manual_seed(1)
    assert torch.equal(Sample(tokens, seed).drawn(mask, place), drawn)


def test_every_token_is_drawn_as_often_as_any_other() -> None:
    mask = torch.ones(4000, 8, dtype=torch.bool)
    mask[:, 6:] = False
    shares = Sample(2).drawn(mask, 0).double().mean(0)
    # Five standard deviations of 4,000 draws with probability 1/3.
    assert float((shares[:6] - 1 / 3).abs().max()) < 5 * (2 / 9 / 4000) ** 0.5


def test_a_draw_has_a_seed_of_its_own_for_each_batch_and_each_shard() -> None:
    mask = torch.ones(4, 40, dtype=torch.bool)
    draws = [Sample(5), Sample(5, 1), Sample(5, 0, 128)]
    found = [sample.drawn(mask, place).flatten().tolist() for sample in draws for place in (0, 1)]
    assert len({tuple(one) for one in found}) == 6


def test_what_is_not_said_keeps_all() -> None:
    assert Sample.of({}) is None
    assert Sample.of({"tokens": None, "tokens_seed": 3}) is None
    assert Sample.of({"tokens": 4, "tokens_seed": 3}, 7) == Sample(4, 3, 7)
    assert Tokens(TEXT).kept(named(3, 6)).tolist() == MASK.flatten().nonzero()[:, 0].tolist()
    assert Tokens(IMAGES).kept(named(3, 6)) is None
    assert Tokens({}).kept(named(3, 6)) is None


@pytest.mark.parametrize("batch", [TEXT, IMAGES])
def test_the_same_tokens_are_kept_however_rows_lie(batch: dict[str, Tensor]) -> None:
    tokens = Tokens(batch, Sample(2), 1)
    rows = named(3, 6)
    kept = names(tokens, rows)
    assert counts(kept) == [2, 2, 2]
    if batch is TEXT:
        assert {name for name in kept if MASK[name // 100, name % 100]} == set(kept)
    assert names(tokens, rows.reshape(-1, 1)) == kept
    assert names(tokens, rows.transpose(0, 1), token_first=True) == kept
    assert names(tokens, rows.transpose(0, 1).reshape(-1, 1), token_first=True) == kept
    picked = torch.randperm(18, generator=torch.Generator().manual_seed(0))[:7]
    found = names(tokens, rows.reshape(-1, 1)[picked], routed=Routed(picked, 18))
    assert found == [name for name in kept if name in rows.reshape(-1)[picked].tolist()]
    # Of another pass they are others, of as many others.
    assert names(Tokens(batch, Sample(2), 2), rows) != kept


def test_a_text_whose_padding_nobody_marks_is_drawn_from_like_one_that_has_none() -> None:
    whole = torch.ones_like(MASK)
    bare = names(Tokens({"input_ids": whole}, Sample(2)), named(3, 6))
    assert bare == names(Tokens({"input_ids": whole, "attention_mask": whole}, Sample(2)), named(3, 6))
    assert counts(bare) == [2, 2, 2]


def test_a_decoders_text_is_sampled_by_itself() -> None:
    answers = torch.ones(3, 4, dtype=torch.int64)
    tokens = Tokens({**TEXT, "decoder_input_ids": answers, "decoder_attention_mask": answers}, Sample(3))
    assert counts(names(tokens, named(3, 6))) == [3, 3, 2]
    assert counts(names(tokens, named(3, 4))) == [3, 3, 3]


def test_rows_that_are_no_sequences_tokens_are_kept() -> None:
    text, images = Tokens(TEXT, Sample(2)), Tokens(IMAGES, Sample(2))
    for tokens in (text, images):
        # One row an example, and a table that all examples share.
        assert tokens.kept(torch.zeros(3, 1)) is None
        assert tokens.kept(torch.zeros(1, 50, 1)) is None
        assert tokens.kept(torch.zeros(50, 1)) is None
    # Of a text of one row nothing but its length tells a table from a sequence.
    alone = Tokens({"input_ids": torch.zeros(1, 6, dtype=torch.int64)}, Sample(2))
    assert alone.kept(torch.zeros(1, 50, 1)) is None
    assert len(names(alone, named(1, 6))) == 2


def test_windows_of_one_image_are_one_sequence() -> None:
    tokens = Tokens(IMAGES, Sample(4))
    rows = named(3, 12)
    kept = names(tokens, rows)
    assert counts(kept) == [4, 4, 4]
    assert names(tokens, rows.reshape(9, 4, 1)) == kept
    assert names(tokens, rows.reshape(3, 3, 4, 1)) == kept


@pytest.mark.parametrize("batch", [TEXT, IMAGES])
@pytest.mark.parametrize("enough", [6, 7, 1000])
def test_with_enough_for_the_longest_the_rows_are_those_without_a_sample(batch: dict[str, Tensor], enough: int) -> None:
    rows = named(3, 6)
    sampled, whole = Tokens(batch, Sample(enough)).kept(rows), Tokens(batch).kept(rows)
    assert (sampled is None) == (whole is None)
    assert whole is None or torch.equal(sampled, whole)
