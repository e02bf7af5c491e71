from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertModel, Gemma3ForCausalLM, Gemma3TextConfig

from bmm.errors import BMMError
from bmm.evaluation.vocabulary import extend, fill, joined, shifted

SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
TABLE = "embeddings.word_embeddings.weight"


def split_off(model: nn.Module, small: nn.Module, names: list[str]) -> None:
    """Give `small`, which has the first rows of `model` as its tables, the rest as further rows."""
    wanted = model.state_dict()
    rows = {name: len(wanted[name]) - len(small.state_dict()[name]) for name in names}
    extend(small, {f"{name.rpartition('.')[0]}.extra_{name.rpartition('.')[2]}": rows[name] for name in names})
    state = small.state_dict()
    for name, tensor in wanted.items():
        if name in names:
            module, _, leaf = name.rpartition(".")
            known = len(tensor) - rows[name]
            state[name].copy_(tensor[:known])
            state[f"{module}.extra_{leaf}"].copy_(tensor[known:])
        elif name != "cls.predictions.bias":
            state[name].copy_(tensor)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 6), st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5), min_size=1, max_size=1))
def test_an_extended_table_looks_up_what_a_whole_one_does(known: int, ids: list[list[int]]) -> None:
    whole = nn.Embedding(10, 3)
    part = nn.ModuleDict({"table": nn.Embedding(known, 3)})
    extend(part, {"table.extra_weight": 10 - known})
    with torch.no_grad():
        part["table"].weight.copy_(whole.weight[:known])
        part["table"].extra_weight.copy_(whole.weight[known:])
    assert torch.equal(part["table"](torch.tensor(ids)), whole(torch.tensor(ids)))
    assert part["table"].num_embeddings == 10


def test_tied_input_and_output_rows_stay_tied() -> None:
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(vocab_size=12, **SIZES)).eval()
    small = BertForMaskedLM(BertConfig(vocab_size=9, **SIZES)).eval()
    model.cls.predictions.bias.data.normal_()
    split_off(model, small, [f"bert.{TABLE}", "cls.predictions.decoder.weight", "cls.predictions.decoder.bias"])
    output, table = small.get_output_embeddings(), small.get_input_embeddings()
    assert output.extra_weight is table.extra_weight
    assert output.weight is table.weight
    ids = torch.tensor([[1, 11, 3, 9]])
    with torch.inference_mode():
        torch.testing.assert_close(small(input_ids=ids).logits, model(input_ids=ids).logits)


def test_tables_that_scale_what_they_look_up_scale_further_rows_too() -> None:
    torch.manual_seed(0)
    config = {**SIZES, "num_key_value_heads": 1, "head_dim": 4, "max_position_embeddings": 16}
    model = Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=12, **config)).eval()
    small = Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=10, **config)).eval()
    split_off(model, small, ["model.embed_tokens.weight", "lm_head.weight"])
    ids = torch.tensor([[2, 11, 10, 9]])
    with torch.inference_mode():
        torch.testing.assert_close(small(input_ids=ids).logits, model(input_ids=ids).logits)


def test_experts_own_rows_lie_one_behind_the_other() -> None:
    news, chat = torch.randn(2, 8), torch.randn(3, 8)
    name = TABLE.replace("weight", "extra_weight")
    tables, starts = joined([{name: news}, {}, {name: chat}])
    assert starts == [0, 2, 2]
    assert torch.equal(tables[name], torch.cat([news, chat]))
    batch = {"input_ids": torch.tensor([[3, 10, 12]]), "attention_mask": torch.ones(1, 3)}
    moved = shifted(batch, 10, starts[2])
    assert moved["input_ids"].tolist() == [[3, 12, 14]]
    assert moved["attention_mask"] is batch["attention_mask"]
    model = BertModel(BertConfig(vocab_size=10, **SIZES))
    for _ in range(2):
        fill(model, copy.deepcopy(tables))
        looked_up = model.get_input_embeddings()(moved["input_ids"])[0]
        assert torch.equal(looked_up[1:], torch.stack([chat[0], chat[2]]))
        assert model.get_input_embeddings().num_embeddings == 15


def test_rows_of_anything_else_are_refused() -> None:
    with pytest.raises(BMMError, match="LayerNorm"):
        extend(nn.Sequential(nn.LayerNorm(3)), {"0.extra_weight": 2})
