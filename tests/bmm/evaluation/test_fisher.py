"""The diagonal Fisher information against a plain loop over rows and classes on the model that transformers loads."""

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

from bmm.errors import RecipeError
from bmm.evaluation.fisher import Labels, diagonal_fisher
from bmm.evaluation.model import TaskModel
from bmm.kinds.text_classification import TextClassificationKind
from bmm.kinds.texts import TextRow as Row

ROWS = [Row(" ".join(f"w{(7 * i + j) % 60}" for j in range(1 + i % 5)), None, i % 3) for i in range(7)]
Pico = Callable[..., Path]


class Count:
    """A bar that counts."""

    def __init__(self) -> None:
        self.steps = 0.0

    def advance(self, steps: float = 1.0) -> None:
        self.steps += steps

    def describe(self, text: str) -> None:
        pass


def loaded(folder: Path) -> TaskModel:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    model = TextClassificationKind().build(config, folder, {"max_length": 16}, 4, "reviews")
    stored = load_file(folder / "model.safetensors")
    prefix = f"{config['model_type']}."
    model.load_head({key: tensor for key, tensor in stored.items() if not key.startswith(prefix)})
    model.load_encoder({key.removeprefix(prefix): t for key, t in stored.items() if key.startswith(prefix)})
    return model


def fisher(folder: Path, labels: Labels, seed: int = 0) -> dict[str, Tensor]:
    model = loaded(folder)
    return diagonal_fisher(model, ROWS, model.encoder_names(), labels=labels, seed=seed, bar=Count())


def plainly(folder: Path, weight: Callable[[int, Tensor], Tensor]) -> dict[str, Tensor]:
    """Return the mean over rows of `Σ_c weight(row, p)_c (∇ log p_c)²`, by one backward pass for each class."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.base_model.named_parameters()}
    for index, row in enumerate(ROWS):
        ids = torch.tensor([tokenizer(row.text, padding=False)["input_ids"]])
        for label in range(3):
            model.zero_grad()
            logs = model(input_ids=ids).logits[0].log_softmax(-1)
            logs[label].backward()
            share = float(weight(index, logs.detach().exp())[label])
            for name, parameter in model.base_model.named_parameters():
                if parameter.grad is not None:
                    total[name] += share * parameter.grad.double() ** 2 / len(ROWS)
    return total


@pytest.mark.parametrize("family", ["bert", "distilbert"])
@pytest.mark.parametrize("labels", ["expected", "data"])
def test_it_is_the_mean_of_every_rows_squared_gradients(pico: Pico, family: str, labels: Labels) -> None:
    folder = pico(family)
    eye = torch.eye(3)
    expected = plainly(folder, lambda row, p: p if labels == "expected" else eye[ROWS[row].label])
    found = fisher(folder, labels)
    assert set(expected) <= set(found)
    for name, tensor in found.items():
        assert tensor.dtype == torch.float64
        wanted = expected.get(name, torch.zeros_like(tensor))
        torch.testing.assert_close(tensor, wanted, rtol=1e-3, atol=1e-6 * float(wanted.max()) + 1e-12)
    assert any(bool(tensor.any()) for tensor in found.values())


def test_drawn_classes_are_those_of_the_experts_own_answer(pico: Pico) -> None:
    folder = pico("distilbert")
    name = "transformer.layer.1.ffn.lin2.weight"
    draws = [fisher(folder, "sampled", seed)[name] for seed in range(60)]
    assert torch.equal(draws[0], fisher(folder, "sampled", 0)[name])
    assert not all(torch.equal(draws[0], draw) for draw in draws)
    stacked = torch.stack(draws).sum((1, 2))
    wanted = float(fisher(folder, "expected")[name].sum())
    # Five standard errors of the mean over seeds.
    assert abs(float(stacked.mean()) - wanted) < 5 * float(stacked.std()) / len(draws) ** 0.5


def test_the_model_stays_as_it_was_and_every_row_is_counted(pico: Pico) -> None:
    model = loaded(pico("bert"))
    before = {name: tensor.clone() for name, tensor in model.encoder.state_dict().items()}
    bar = Count()
    diagonal_fisher(model, ROWS, model.encoder_names(), labels="data", seed=0, bar=bar)
    assert bar.steps == len(ROWS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.encoder.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in model.module.parameters())


def test_a_model_that_answers_no_class_is_refused(pico: Pico) -> None:
    model = loaded(pico("bert", num_labels=1))
    with pytest.raises(RecipeError, match="'fisher' needs experts that answer one class a row, which reviews does not"):
        diagonal_fisher(model, ROWS, model.encoder_names(), labels="data", seed=0, bar=Count())


def test_a_gradient_that_is_not_finite_is_named(pico: Pico) -> None:
    model = loaded(pico("bert"))
    with torch.no_grad():
        model.encoder.encoder.layer[1].output.dense.weight.mul_(1e38)
    with pytest.raises(FloatingPointError, match="in the model of reviews are not finite"):
        diagonal_fisher(model, ROWS, model.encoder_names(), labels="data", seed=0, bar=Count())
