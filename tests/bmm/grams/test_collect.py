from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import batches, encoder
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from bmm.checkpoint.architecture import encoder_names
from bmm.checkpoint.reader import Checkpoint
from bmm.errors import BMMError
from bmm.evaluation.model import TaskModel
from bmm.grams.collect import GramSum, collect
from bmm.kinds.text_classification import TextClassificationKind
from bmm.kinds.texts import TextRow as Row
from bmm.modules.linear import LinearMap, discover
from bmm.modules.tokens import Sample

TEXTS = [" ".join(f"w{(index * step) % 60}" for step in range(1, 3 + index % 9)) for index in range(21)]
QUERY, OUT = "encoder.layer.0.attention.self.query", "encoder.layer.1.attention.output.dense"
GROUPS = [QUERY, OUT, "encoder.layer.1.intermediate.dense", "encoder.layer.1.output.dense", "pooler.dense"]


def loaded(expert: Path, batch_size: int) -> TaskModel:
    with Checkpoint.open(expert) as checkpoint:
        model = TextClassificationKind().build(
            checkpoint.config, checkpoint.path, {"max_length": 16}, batch_size, "task0"
        )
        names = encoder_names(checkpoint, "bert")
        model.load_encoder({name: checkpoint.tensor(names[name]) for name in model.encoder_names()})
    return model


def sums(expert: Path, batch_size: int) -> dict[str, GramSum]:
    model = loaded(expert, batch_size)
    rows = model.prepare([Row(text, None, 0) for text in TEXTS])
    tokens = torch.ones(2, 4, dtype=torch.int64)
    maps = discover(model.encoder, {"input_ids": tokens, "attention_mask": tokens})
    return collect(model.encoder, model.batches(rows), [map_ for map_ in maps if map_.module in GROUPS])


@pytest.fixture(scope="module")
def expert(pico_source: Path) -> Path:
    return pico_source / "experts" / "task0"


def test_a_gram_is_that_of_the_real_inputs_without_padding(expert: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(expert)
    model = AutoModelForSequenceClassification.from_pretrained(expert).eval()
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in GROUPS}
    modules = dict(model.bert.named_modules())
    for name in GROUPS:

        def keep(_: nn.Module, inputs: tuple[torch.Tensor, ...], name: str = name) -> None:
            seen[name].append(inputs[0].reshape(-1, inputs[0].shape[-1]).double())

        modules[name].register_forward_pre_hook(keep)
    with torch.inference_mode():
        for text in TEXTS:
            encoded = tokenizer(text, return_tensors="pt")
            model(input_ids=encoded["input_ids"])
    tokens = sum(len(tokenizer(text)["input_ids"]) for text in TEXTS)
    found = sums(expert, 8)
    assert list(found) == GROUPS or set(found) == set(GROUPS)
    for name in GROUPS:
        inputs = torch.cat(seen[name])
        assert found[name].rows == inputs.shape[0] == (len(TEXTS) if name == "pooler.dense" else tokens)
        assert found[name].total.dtype == torch.float64
        wanted = inputs.T @ inputs
        assert float((found[name].total - wanted).norm() / wanted.norm()) < 1e-6, name


def test_padding_changes_nothing(expert: Path) -> None:
    alone, together = sums(expert, 1), sums(expert, 32)
    for name in GROUPS:
        assert alone[name].rows == together[name].rows
        difference = (alone[name].total - together[name].total).norm() / alone[name].total.norm()
        assert float(difference) < 1e-6, name


def test_the_same_batches_give_the_same_bytes(expert: Path) -> None:
    one, two = sums(expert, 4), sums(expert, 4)
    assert all(torch.equal(one[name].total, two[name].total) for name in GROUPS)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(3, 3)
        self.unused = nn.Linear(3, 3)

    def forward(self, states: torch.Tensor, **_: Any) -> torch.Tensor:
        out: torch.Tensor = self.used(states)
        return out


def maps(*names: str) -> list[LinearMap]:
    return [LinearMap(name, 3, 3, name, "other", None, f"{name}.weight") for name in names]


def test_sums_over_batches_add_and_the_mask_decides_what_counts() -> None:
    states = torch.arange(24.0).reshape(2, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    batches = [{"states": states, "attention_mask": mask}, {"states": -states, "attention_mask": mask}]
    found = collect(Small(), batches, maps("used"))["used"]
    kept = states[mask.bool()].double()
    assert found.rows == 10
    assert torch.equal(found.total, 2 * kept.T @ kept)
    plain = collect(Small(), [{"states": states}], maps("used"))["used"]
    assert plain.rows == 8


def test_of_a_sample_the_gram_is_that_of_the_rows_that_were_drawn() -> None:
    states = torch.arange(48.0).reshape(2, 8, 3)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0]])
    batches = [{"states": states, "attention_mask": mask}, {"states": -states, "attention_mask": mask}]
    sample = Sample(3, tokens_seed=5)
    drawn = [sample.drawn(mask.bool(), place) for place in (0, 1)]
    assert [one.sum(1).tolist() for one in drawn] == [[3, 2], [3, 2]]
    picked = torch.cat([states[drawn[0]], -states[drawn[1]]]).double()
    found = collect(Small(), batches, maps("used"), sample)["used"]
    assert found.rows == 10
    assert torch.equal(found.total, picked.T @ picked)
    images = collect(Small(), [{"states": states}], maps("used"), sample)["used"]
    picked = states[sample.drawn(torch.ones(2, 8, dtype=torch.bool), 0)].double()
    assert images.rows == 6
    assert torch.equal(images.total, picked.T @ picked)


# Texts, images (with a patch convolution and with fused attention), sounds, mixtures, two texts at once.
@pytest.mark.parametrize(
    "family", ["bert", "deberta-v2", "gpt2", "vit", "openclip", "whisper-encoder", "mixtral", "t5"]
)
def test_every_layer_sees_a_sample_of_every_sequence(family: str) -> None:
    model, inputs = encoder(family, 1), batches(family, 2, 2)
    found = discover(model, {name: value[:2] for name, value in inputs[0].items()})
    readers = [map_ for map_ in found if map_.input_group == map_.module]
    whole, enough, few = (collect(model, inputs, readers, sample) for sample in (None, Sample(100), Sample(2)))
    for name, part in whole.items():
        assert enough[name].rows == part.rows
        assert torch.equal(enough[name].total, part.total), name
    if family == "deberta-v2":
        # Its positions are read beside the tokens, all of them.
        few = {name: part for name, part in few.items() if "query_proj" not in name}
    assert {part.rows for name, part in few.items() if ".experts." not in name} <= {2 * 16, 16}
    pooled = [name for name, part in few.items() if part.rows == 16 and ".experts." not in name]
    assert all("pooler" in name for name in pooled)
    routed = [part.rows for name, part in few.items() if ".experts.gate_up_proj." in name]
    assert sum(routed) == (2 * 2 * 2 * 16 if routed else 0)


def test_a_module_that_never_fires_is_named() -> None:
    with pytest.raises(BMMError, match="unused was never reached"):
        collect(Small(), [{"states": torch.ones(1, 2, 3)}], maps("used", "unused"))


def test_an_input_that_is_not_finite_is_named() -> None:
    with pytest.raises(BMMError, match="inputs of used are not finite"):
        collect(Small(), [{"states": torch.full((1, 2, 3), torch.inf)}], maps("used"))


def test_gram_sums_are_the_same_at_any_module_that_holds_the_matrix() -> None:
    # As `torch.nn.Linear`, as GPT-2's transposed one, and fused into an attention's `in_proj_weight`.
    for family in ("bert", "gpt2", "openclip", "mixtral"):
        model = encoder(family, 1)
        rows = batches(family, 2)
        found = discover(model, {name: value[:2] for name, value in rows[0].items()})
        sums = collect(model, rows, [map_ for map_ in found if map_.input_group == map_.module])
        for map_ in found:
            assert sums[map_.input_group].total.shape == (map_.inputs, map_.inputs)
        tokens = [batch["attention_mask"].sum() for batch in rows if "attention_mask" in batch]
        plain = [name for name in sums if ".experts." not in name and "pooler" not in name]
        if tokens:
            assert {sums[name].rows for name in plain} == {int(sum(tokens))}
