"""Language models merged whole, measured by likelihood and by what they answer, against transformers itself."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.utils import logging

import bmm
from bmm.checkpoint.reader import Checkpoint
from bmm.errors import CheckpointError, RecipeError
from bmm.kinds.causal_lm import CausalLMKind, CausalRow
from bmm.report.card import FOLDER_PLACEHOLDER

logging.disable_progress_bar()

KIND = CausalLMKind()
WORDS = 12
READING = {"kind": "causal-lm", "max_length": 16}


def base_of(family: str) -> Any:
    torch.manual_seed(0)
    if family == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=WORDS + 2, n_positions=20, n_embd=16, n_layer=2, n_head=2, eos_token_id=WORDS, bos_token_id=WORDS
        )
        return transformers.GPT2Model(config)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.LlamaConfig(
        **shape, vocab_size=WORDS + 2, max_position_embeddings=32, eos_token_id=WORDS, bos_token_id=WORDS
    )
    return transformers.LlamaForCausalLM(config)


def save_tokenizer(folder: Path) -> None:
    """Save a tokenizer of whole words that has an end but no padding."""
    vocabulary = {**{f"w{index}": index for index in range(WORDS)}, "[END]": WORDS, ":": WORDS + 1}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[END]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[END]").save_pretrained(folder)


def build(folder: Path, family: str, metric: str) -> Path:
    base_of(family).save_pretrained(folder / "base")
    save_tokenizer(folder / "base")
    entries = []
    for index, step in enumerate((1, 5)):
        generator = random.Random(index)
        data = folder / "data" / f"task{index}"
        data.mkdir(parents=True)
        everything = [(first, length) for first in range(WORDS) for length in range(2, 9)]
        generator.shuffle(everything)
        rows = []
        for first, length in everything:
            words = [f"w{(first + step * place) % WORDS}" for place in range(length + 2)]
            rows.append({"ask": " ".join(words[:length]) + " : ", "reply": " ".join(words[length:])})
        cuts = {"calibration": rows[:16], "validation": rows[16:36], "test": rows[36:56], "training": rows}
        train(folder / "base", folder / "experts" / f"task{index}", cuts["training"], index)
        task: dict[str, Any] = {"kind": "causal-lm", "prompt": "ask", "answer": "reply", "max_length": 16}
        task |= {"metric": metric, "max_new_tokens": 4}
        for split in ("calibration", "validation", "test"):
            (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in cuts[split]))
            task[split] = {"path": "json", "data_files": f"data/task{index}/{split}.jsonl"}
        entries.append({"name": f"task{index}", "model": f"./experts/task{index}", "task": task})
    recipe = {
        "base_model": "./base",
        "experts": entries,
        "output": "./merged",
        "grams": {"shard_rows": 8},
        "search": {"per": "model", "trials": 2},
        "cluster": {"workers": 1},
        "evaluation": {"bootstrap_samples": 100, "compare": ["average"]},
        "coverage": {"minimum": 0.3},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return folder / "recipe.yaml"


def train(base: Path, target: Path, rows: list[dict[str, str]], seed: int) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for start in [*range(0, len(rows), 28)] * 30:
        texts = [tokenizer(row["ask"] + row["reply"] + " [END]")["input_ids"] for row in rows[start : start + 28]]
        width = max(map(len, texts))
        tokens = torch.tensor([text + [WORDS] * (width - len(text)) for text in texts])
        mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])
        model(input_ids=tokens, attention_mask=mask, labels=tokens.masked_fill(mask == 0, -100)).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    model.save_pretrained(target)
    save_tokenizer(target)
    torch.set_num_threads(threads)


def test_rows_are_known_by_their_prompts_and_come_back(tmp_path: Path) -> None:
    row = CausalRow("one  two ", "three")
    assert row.identity == CausalRow("one two", "four").identity != CausalRow("", "one two").identity
    assert KIND.row(row.document()) == row
    for values, message in (
        ({"prompt": "ask"}, "prompt and answer name two columns"),
        ({"metric": "exact-match"}, "exact-match needs the columns prompt and answer"),
    ):
        expert = {"name": "a", "model": "m", "task": {"kind": "causal-lm", **values}}
        with pytest.raises(RecipeError, match=message):
            bmm.Recipe.from_mapping({"base_model": "b", "output": "o", "experts": [expert, {**expert, "name": "c"}]})


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_likelihoods_are_those_of_each_row_alone(tmp_path: Path, family: str) -> None:
    base = base_of(family)
    target = transformers.AutoModelForCausalLM.from_config(base.config).eval()
    target.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    rows = [CausalRow("w1 w2 ", "w3"), CausalRow("", "w4 w5 w6 w7 w8"), CausalRow("w9 ", "w1 w2 w3 w4")]
    with Checkpoint.open(tmp_path) as checkpoint:
        model = KIND.build(checkpoint.config, tmp_path, READING, 2, "it")
        model.load_head({})
        model.load_encoder({name: checkpoint.tensor(name) for name in checkpoint.names()})
    found = model.logits(model.prepare(rows))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for row, (likelihood, count) in zip(rows, found.tolist(), strict=True):
        ids = tokenizer(row.prompt + row.answer, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            logs = target(input_ids=ids).logits.log_softmax(-1)
        tokens = len(row.answer.split()) - (not row.prompt)
        expected = [logs[0, place - 1, ids[0, place]].item() for place in range(ids.shape[1] - tokens, ids.shape[1])]
        assert count == tokens
        assert likelihood == pytest.approx(sum(expected), rel=1e-4)
    metric = KIND.metrics["likelihood"]
    sums = metric.statistics(found, ["", "", ""]).sum(0)
    assert float(metric.also["nll"](sums)) == pytest.approx(-float(found[:, 0].sum() / found[:, 1].sum()))
    assert float(metric.score(sums)) == pytest.approx(math.exp(-float(metric.also["nll"](sums))))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "metric", "mode"), [("gpt2", "exact-match", "propagated"), ("llama", "likelihood", "module-wise")]
)
def test_a_merge_of_language_models_is_one(
    tmp_path: Path, family: str, metric: str, mode: str, in_process: None, edit_recipe: Any
) -> None:
    build(tmp_path, family, metric)
    merge = bmm.merge(bmm.Recipe.from_yaml(edit_recipe(tmp_path, regression={"mode": mode})), store=tmp_path / "store")
    assert not (merge.output / "heads").exists()
    assert type(transformers.AutoModel.from_pretrained(merge.output)).__name__ in ("GPT2Model", "LlamaModel")
    model = transformers.AutoModelForCausalLM.from_pretrained(merge.output).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(merge.output)
    for task in ("task0", "task1"):
        measured = merge.document["metrics"]["test"][task]
        assert measured["metric"] == metric
        assert measured["expert"] > 0.5
        rows = [json.loads(line) for line in (tmp_path / "data" / task / "test.jsonl").read_text().splitlines()]
        right, likelihood, count = 0, 0.0, 0
        for row in rows:
            prompt = tokenizer(row["ask"], return_tensors="pt")
            with torch.inference_mode():
                made = model.generate(**prompt, do_sample=False, max_new_tokens=4, pad_token_id=WORDS)[0]
                whole = tokenizer(row["ask"] + row["reply"], return_tensors="pt")["input_ids"]
                logs = model(input_ids=whole).logits.log_softmax(-1)[0, :-1].gather(1, whole[0, 1:, None])[:, 0]
            start = prompt["input_ids"].shape[1]
            right += tokenizer.decode(made[start:], skip_special_tokens=True) == row["reply"]
            likelihood += float(logs[start - 1 :].sum())
            count += whole.shape[1] - start
        if metric == "exact-match":
            assert measured["merged"] == pytest.approx(right / len(rows))
        else:
            assert measured["merged"] == pytest.approx(math.exp(likelihood / count), rel=1e-4)
            assert measured["nll"]["merged"] == pytest.approx(-likelihood / count, rel=1e-4)
    (code,) = re.findall(r"```python\n(.*?)```", (merge.output / "README.md").read_text(), flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace(FOLDER_PLACEHOLDER, str(merge.output)).replace("a text to go on from", "w1 w2"), names)  # noqa: S102
    assert names["text"].startswith("w1 w2")


def test_a_base_without_the_output_layer_that_experts_have_is_refused(tmp_path: Path, in_process: None) -> None:
    path = build(tmp_path, "llama", "likelihood")
    base_of("llama").model.save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"has the tensor 'lm_head.weight', which the base .* lacks"):
        bmm.merge(bmm.Recipe.from_yaml(path), store=tmp_path / "store")
