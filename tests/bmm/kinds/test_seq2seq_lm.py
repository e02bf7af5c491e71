"""Encoder-decoders, measured by likelihood and by what they write, against transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from family_checkpoints import config_of, move, save_tokenizer

import bmm
from bmm.checkpoint.reader import Checkpoint
from bmm.errors import CheckpointError, DataError, RecipeError
from bmm.kinds.causal_lm import CausalRow
from bmm.kinds.seq2seq_lm import Seq2SeqLMKind
from bmm.modules.linear import discover
from bmm.modules.tokens import Tokens
from bmm.modules.watch import Observer, Product, Watch

KIND = Seq2SeqLMKind()
READING = {"kind": "seq2seq-lm", "max_length": 16, "max_answer_length": 8}
ROWS = [
    CausalRow("1 2 3", "4"),
    CausalRow("5 6 7 8 1 2", "3 4 5 6 7"),
    CausalRow("9 1", "2 3 4"),
    CausalRow("1 1 1 1", "2 2"),
]


def build(folder: Path, family: str, **asked: Any) -> tuple[Any, Any, Any]:
    """Return transformers' model, our own with the same weights, and the tokenizer."""
    torch.manual_seed(0)
    target = transformers.AutoModelForSeq2SeqLM.from_config(config_of(family)).eval()
    move(target, 1, by=0.3)
    target.save_pretrained(folder)
    tokenizer = save_tokenizer(folder)
    with Checkpoint.open(folder) as checkpoint:
        model = KIND.build(checkpoint.config, folder, {**READING, **asked}, 3, "it")
        model.load_head({})
        model.load_encoder({name: checkpoint.tensor(name) for name in checkpoint.names()})
    return target, model, tokenizer


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_likelihoods_are_those_of_each_row_alone(tmp_path: Path, family: str) -> None:
    target, model, tokenizer = build(tmp_path, family)
    found = model.logits(model.prepare(ROWS))
    for row, (likelihood, count) in zip(ROWS, found.tolist(), strict=True):
        labels = tokenizer(text_target=row.answer, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            loss = target(**tokenizer(row.prompt, return_tensors="pt", return_token_type_ids=False), labels=labels).loss
        assert count == labels.shape[1]
        assert likelihood == pytest.approx(-float(loss) * count, rel=1e-4)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_answer_is_met_where_transformers_writes_it(tmp_path: Path, family: str) -> None:
    target, model, tokenizer = build(tmp_path, family, metric="exact-match", max_new_tokens=6)
    written = []
    for row in ROWS:
        inputs = tokenizer(row.prompt, return_tensors="pt", return_token_type_ids=False)
        made = target.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=6)
        written.append(tokenizer.decode(made[0], skip_special_tokens=True))
    assert len(set(written)) > 1
    asked = [
        CausalRow(row.prompt, said if place % 2 else "8 8 8 8")
        for place, (row, said) in enumerate(zip(ROWS, written, strict=True))
    ]
    found = model.logits(model.prepare(asked))[:, 0].tolist()
    assert found == [float(" ".join(row.answer.split()) == said) for row, said in zip(asked, written, strict=True)]
    assert sum(found) >= 2


class _Seen(Observer):
    def __init__(self) -> None:
        self.rows: dict[str, int] = {}

    def read(self, product: Product) -> None:
        count = len(product.kept(product.rows))
        self.rows[product.site.weight] = self.rows.get(product.site.weight, 0) + count


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_no_padding_of_either_text_is_read(tmp_path: Path, family: str) -> None:
    _, model, tokenizer = build(tmp_path, family)
    prepared = model.prepare(ROWS)
    seen = _Seen()
    with torch.inference_mode(), Watch(model.encoder, seen) as watch:
        for batch in model.batches(prepared):
            assert batch["input_ids"].shape[1] != batch["decoder_input_ids"].shape[1]
            watch.begin(Tokens(batch))
            model.encoder(**batch)
    prompts = sum(len(tokenizer(row.prompt)["input_ids"]) for row in ROWS)
    answers = sum(len(tokenizer(row.answer)["input_ids"]) for row in ROWS)
    assert prompts != answers
    bare = KIND.bare(config_of(family).to_dict(), "it")
    names = {map_.weight for map_ in discover(bare.encoder, KIND.probe(bare))}
    assert names <= seen.rows.keys()
    crossing = {name for name in names if "decoder" in name and ("EncDecAttention" in name or "encoder_attn" in name)}
    for name in names:
        across = name in crossing and any(part in name for part in (".k.", ".v.", "k_proj", "v_proj"))
        reads_prompt = across or (name.removeprefix("model.").startswith("encoder."))
        assert seen.rows[name] == (prompts if reads_prompt else answers), name


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    _, model, _ = build(tmp_path, "bart")
    with pytest.raises(DataError, match=r"the model has \d+ positions; set task\.max_length"):
        KIND.build(model.module.config.to_dict(), tmp_path, {**READING, "max_length": 4096}, 2, "it").prepare(
            [CausalRow("1 " * 3000, "2")]
        )
    with Checkpoint.open(tmp_path) as checkpoint:
        small = KIND.build({**checkpoint.config, "vocab_size": 5}, tmp_path, READING, 2, "it")
    with pytest.raises(CheckpointError, match="use the tokenizer that the model was trained with"):
        small.prepare(ROWS)
    expert = {"name": "a", "model": "m", "task": {"kind": "seq2seq-lm", "max_answer_length": 1}}
    with pytest.raises(RecipeError, match="max_answer_length"):
        bmm.Recipe.from_mapping({"base_model": "b", "output": "o", "experts": [expert, {**expert, "name": "c"}]})
