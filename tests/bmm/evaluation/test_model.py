"""Classifiers built without weights against those that transformers loads itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from bmm.errors import BMMError, CheckpointError, DataError
from bmm.evaluation.model import TaskModel
from bmm.kinds.text_classification import TextClassificationKind
from bmm.kinds.texts import TextRow as Row

FAMILIES = ["bert", "roberta", "distilbert"]
ROWS = [Row(" ".join(f"w{(7 * i + j) % 60}" for j in range(1 + i % 9)), None, i % 3) for i in range(11)]
Pico = Callable[..., Path]


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def parts_of(folder: Path, travelling: str = "//") -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return head and encoder of a saved classifier; names that start with `travelling` go with the head."""
    prefix = config_of(folder)["model_type"] + "."
    head, encoder = {}, {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        name = key.removeprefix(prefix)
        if name == key or name.startswith(travelling):
            head[key] = tensor
        else:
            encoder[name] = tensor
    return head, encoder


def build(config: dict[str, Any], folder: Path, max_length: int, batch_size: int) -> TaskModel:
    return TextClassificationKind().build(config, folder, {"max_length": max_length}, batch_size, "reviews")


def built(folder: Path, *, batch_size: int = 4, max_length: int = 16, **changes: Any) -> TaskModel:
    return build(config_of(folder) | changes, folder, max_length, batch_size)


def loaded(folder: Path, travelling: str = "//", **options: Any) -> TaskModel:
    model = built(folder, **options)
    head, encoder = parts_of(folder, travelling)
    model.load_head(head)
    model.load_encoder(encoder)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_from_pretrained_bit_for_bit(pico: Pico, family: str) -> None:
    folder = pico(family)
    model = loaded(folder)
    reference = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenised = model.prepare(ROWS)
    logits = model.logits(tokenised)
    assert logits.dtype == torch.float32
    assert logits.shape == (len(ROWS), 3)
    with torch.inference_mode():
        expected = torch.cat([reference(**batch).logits for batch in model.batches(tokenised)])
    assert torch.equal(logits[list(tokenised.order)], expected)
    assert torch.equal(model.logits(tokenised), logits)
    buffers = dict(reference.named_buffers())
    assert {name: buffer.tolist() for name, buffer in model.module.named_buffers()} == {
        name: buffer.tolist() for name, buffer in buffers.items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_alone_and_in_a_batch_agree(pico: Pico, family: str) -> None:
    model = loaded(pico(family), batch_size=len(ROWS))
    together = model.logits(model.prepare(ROWS))
    alone = torch.cat([model.logits(model.prepare([row])) for row in ROWS])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_pairs_run_in_every_family(pico: Pico, family: str) -> None:
    model = loaded(pico(family))
    tokenised = model.prepare([Row("w1 w2", "w3", 0), Row("w1", "w2 w3", 0)])
    assert ("token_type_ids" in tokenised.columns) == (family == "bert")
    first, second = model.logits(tokenised)
    assert not torch.allclose(first, second, atol=1e-4)


def test_building_leaves_the_random_state_alone(pico: Pico) -> None:
    folder = pico()
    before = torch.get_rng_state()
    model = built(folder)
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.module.training
    assert not any(parameter.requires_grad for parameter in model.module.parameters())


def test_configurations_as_they_are_found(pico: Pico) -> None:
    folder = pico()
    odd = {
        "auto_map": {"AutoModelForSequenceClassification": "elsewhere--own.Own"},
        "torch_dtype": "float16",
        "problem_type": "single_label_classification",
        "return_dict": False,
        "_name_or_path": "nowhere",
    }
    plain, strange = loaded(folder), loaded(folder, **odd)
    tokenised = plain.prepare(ROWS)
    assert torch.equal(plain.logits(tokenised), strange.logits(tokenised))


def test_other_dtypes_are_cast(pico: Pico) -> None:
    folder = pico()
    model = built(folder)
    head, encoder = parts_of(folder)
    model.load_head({key: tensor.bfloat16() for key, tensor in head.items()})
    model.load_encoder({name: tensor.double() for name, tensor in encoder.items()})
    assert {tensor.dtype for tensor in model.module.parameters()} == {torch.float32}
    assert torch.equal(model.module.classifier.weight, head["classifier.weight"].bfloat16().float())
    assert torch.isfinite(model.logits(model.prepare(ROWS))).all()


def test_progress_counts_rows(pico: Pico) -> None:
    class Counting:
        steps: list[float] = []  # noqa: RUF012

        def advance(self, steps: float = 1.0) -> None:
            self.steps.append(steps)

        def describe(self, text: str) -> None:
            raise AssertionError(text)

    model = loaded(pico())
    model.logits(model.prepare(ROWS), Counting())
    assert Counting.steps == [4, 4, 3]


def test_no_rows_give_no_logits(pico: Pico) -> None:
    model = loaded(pico())
    assert model.logits(model.prepare([])).shape == (0, 3)


def test_names_computed_by_the_model_are_passed_over(pico: Pico) -> None:
    folder = pico()
    model = loaded(folder)
    _, encoder = parts_of(folder)
    expected = model.logits(model.prepare(ROWS))
    model.load_encoder({**encoder, "embeddings.position_ids": torch.zeros(1, 512, dtype=torch.int64)})
    assert torch.equal(model.logits(model.prepare(ROWS)), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.pop("encoder.layer.1.output.dense.bias"),
            "is not given encoder.layer.1.output.dense.bias",
        ),
        (lambda state: state.update(extra=torch.zeros(1)), "is given extra, which it does not have"),
        (
            lambda state: state.update({"pooler.dense.bias": torch.zeros(2)}),
            r"is given pooler.dense.bias of shape \(2,\), but has it as \(16,\)",
        ),
    ],
)
def test_wrong_encoders_are_named_and_change_nothing(
    pico: Pico, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    folder = pico()
    model = loaded(folder)
    before = model.logits(model.prepare(ROWS))
    state = {name: tensor + 1 for name, tensor in parts_of(folder)[1].items()}
    change(state)
    with pytest.raises(BMMError, match=f"the encoder of reviews {message}"):
        model.load_encoder(state)
    assert torch.equal(model.logits(model.prepare(ROWS)), before)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"classifier.weight": torch.zeros(3, 16)}, "the head of reviews is not given classifier.bias"),
        ({"bert.nothing": torch.zeros(1)}, "is given bert.nothing, which it does not have"),
        ({"score": torch.zeros(1)}, "is given score, which it does not have"),
        (
            {"classifier.weight": torch.zeros(2, 16)},
            r"classifier.weight of shape \(2, 16\), but has it as \(3, 16\)",
        ),
    ],
)
def test_wrong_heads_are_named(pico: Pico, head: dict[str, Tensor], message: str) -> None:
    with pytest.raises(BMMError, match=message):
        built(pico()).load_head(head)


def test_models_without_weights_do_not_answer(pico: Pico) -> None:
    folder = pico()
    head, encoder = parts_of(folder, "pooler")
    model = built(folder)
    with pytest.raises(BMMError, match="the model of reviews has no weights yet"):
        model.logits(model.prepare(ROWS))
    model.load_head(head)
    with pytest.raises(BMMError, match="no weights yet"):
        model.logits(model.prepare(ROWS))
    model.load_encoder(encoder)
    assert torch.isfinite(model.logits(model.prepare(ROWS))).all()
    model.load_head(parts_of(folder)[0])
    with pytest.raises(BMMError, match="no weights yet"):
        model.logits(model.prepare(ROWS))


def test_encoder_weights_that_travel_with_the_head(pico: Pico) -> None:
    folder = pico()
    model = loaded(folder, "pooler")
    assert not any(name.startswith("pooler") for name in model.encoder_names())
    assert torch.equal(model.logits(model.prepare(ROWS)), loaded(folder).logits(model.prepare(ROWS)))
    with pytest.raises(BMMError, match=r"is given pooler.dense.bias, which it does not have"):
        model.load_encoder(parts_of(folder)[1])


def test_one_encoder_serves_several_heads(pico: Pico) -> None:
    folders = [pico(seed=0, num_labels=3), pico(seed=1, num_labels=5), pico(seed=2, num_labels=2)]
    models = [loaded(folder, "pooler") for folder in folders]
    tokenised = models[0].prepare(ROWS)
    own = [model.logits(tokenised) for model in models]
    for model in models[1:]:
        model.share_encoder(models[0])
    pointers = {model.encoder.embeddings.word_embeddings.weight.data_ptr() for model in models}
    assert len(pointers) == 1
    assert len({model.encoder.pooler.dense.weight.data_ptr() for model in models}) == 3
    for index, folder in enumerate(folders):
        models[-1 - index].load_encoder(parts_of(folder, "pooler")[1])
        assert torch.equal(models[index].logits(tokenised), own[index])
    assert [model.logits(tokenised).shape[1] for model in models] == [3, 5, 2]
    assert not torch.equal(models[0].logits(tokenised), own[0])


def test_encoders_that_cannot_be_shared(pico: Pico) -> None:
    one = loaded(pico())
    with pytest.raises(BMMError, match=r"embeddings.word_embeddings.weight is not the same in both"):
        one.share_encoder(loaded(pico(vocab_size=101)))
    with pytest.raises(BMMError, match=r"pooler.dense.weight is not the same in both"):
        one.share_encoder(loaded(pico(seed=3), "pooler"))
    with pytest.raises(BMMError, match="must be loaded before their encoder is shared"):
        one.share_encoder(built(pico(seed=4)))
    other = loaded(pico(seed=5))
    one.share_encoder(other)
    with pytest.raises(BMMError, match="changes which encoder weights are its own after they were shared"):
        other.load_head(parts_of(pico(seed=6), "pooler")[0])


def test_logits_that_are_not_finite(pico: Pico) -> None:
    folder = pico()
    model = loaded(folder)
    encoder = parts_of(folder)[1]
    encoder["encoder.layer.0.output.dense.bias"][3] = float("nan")
    model.load_encoder(encoder)
    with pytest.raises(FloatingPointError, match="the logits of reviews are not finite"):
        model.logits(model.prepare(ROWS))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "does not describe a model that transformers has as a text classifier: it has no model_type"),
        ({"model_type": "no-such"}, "Unrecognized model identifier: no-such"),
        ({"model_type": "clip_vision_model"}, "Unrecognized configuration class"),
        ({"model_type": "bert", "hidden_size": "wide"}, "hidden_size"),
    ],
)
def test_configurations_of_something_else(
    tokenizer_folder: Callable[..., Path], config: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=f"the config.json of reviews .*{message}") as caught:
        build(config, tokenizer_folder(), 16, 4)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_with_more_tokens_than_the_model(pico: Pico) -> None:
    model = built(pico(vocab_size=20))
    assert len(model.prepare([Row("w0 w1", None, 0)])) == 1
    with pytest.raises(CheckpointError, match=r"gives the token 63, but the model has only 20 tokens"):
        model.prepare([Row("w0 w59", None, 0)])


@pytest.mark.parametrize(("family", "positions"), [("bert", 48), ("roberta", 47), ("distilbert", 48)])
def test_rows_longer_than_the_positions(pico: Pico, family: str, positions: int) -> None:
    model = loaded(pico(family), max_length=64)
    fitting = Row(" ".join(["w1"] * (positions - 2)), None, 0)
    assert torch.isfinite(model.logits(model.prepare([fitting]))).all()
    with pytest.raises(DataError, match=f"but the model has {positions} positions; set task.max_length to at most"):
        model.prepare([Row(fitting.text + " w1", None, 0)])


def test_a_text_without_tokens(pico: Pico, tokenizer_folder: Callable[..., Path]) -> None:
    model = build(config_of(pico()), tokenizer_folder(frame=False), 16, 4)
    with pytest.raises(DataError, match="makes no token of the text"):
        model.prepare([Row("w1", None, 0), Row("\u3000", None, 0)])
