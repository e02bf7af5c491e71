"""The walk against what it must do: reproduce an expert that nothing contradicts, and see what really arrives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel, RobertaConfig, RobertaModel

from bmm.assembly import with_bias
from bmm.errors import CheckpointError
from bmm.modules.linear import LinearMap, discover
from bmm.progress import SilentReporter
from bmm.regression.propagate import Moments, Walk, units_of

SIZES: dict[str, Any] = {"vocab_size": 40, "max_position_embeddings": 24, "pad_token_id": 0}
BERT = {**SIZES, "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 12}
ARCHITECTURES: dict[str, Callable[[], torch.nn.Module]] = {
    "bert": lambda: BertModel(BertConfig(**BERT)),
    "roberta": lambda: RobertaModel(RobertaConfig(**BERT), add_pooling_layer=False),
    "distilbert": lambda: DistilBertModel(DistilBertConfig(**SIZES, dim=8, n_layers=3, n_heads=2, hidden_dim=12)),
}


def encoder(kind: str, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = ARCHITECTURES[kind]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # As wide as trained weights: at the initial 0.02 every layer would be all but linear.
            parameter.add_(0.25 * torch.randn(parameter.shape))
    return model


def rows(seed: int, batches: int = 6) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(batches):
        lengths = torch.randint(3, 17, (8,), generator=generator)
        mask = (torch.arange(16)[None] < lengths[:, None]).long()
        found.append({"input_ids": torch.randint(1, 40, (8, 16), generator=generator) * mask, "attention_mask": mask})
    return found


def walk_of(kind: str, start: torch.nn.Module, experts: list[torch.nn.Module], batches: list[Any]) -> Walk:
    scratch = copy.deepcopy(start)
    target = dict(scratch.named_parameters())

    def load(index: int, prefix: str) -> None:
        with torch.no_grad():
            for name, parameter in experts[index].named_parameters():
                if name.startswith(prefix):
                    target[name].copy_(parameter)

    return Walk(start, scratch, load, batches, discover(start, batches[0][0]), kind)


def run(walk: Walk, anchor: torch.nn.Module, lam: float) -> dict[str, Moments]:
    parameters = dict(anchor.named_parameters())
    bar = SilentReporter().start("", 1)
    found = {}
    for unit in walk.units:
        for group, moments in walk.moments(unit, bar):
            found[group] = moments
            spectrum = moments.spectrum(group)
            for map_ in unit.groups[group]:
                prior = with_bias(map_, parameters.__getitem__)
                walk.apply(map_, moments.posterior(spectrum, map_.module, prior).mean(lam))
        walk.advance(unit)
    return found


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_experts_that_agree_are_reproduced_from_any_anchor(kind: str) -> None:
    expert, anchor = encoder(kind, 1), encoder(kind, 2)
    # What is not a linear map follows the anchor, so it is the expert's here.
    with torch.no_grad():
        linear = {name for map_ in discover(anchor, rows(0)[0]) for name in map_.parameters}
        values = dict(expert.named_parameters())
        for name, parameter in anchor.named_parameters():
            if name not in linear:
                parameter.copy_(values[name])
    merged = copy.deepcopy(anchor)
    run(walk_of(kind, merged, [expert, expert], [rows(3), rows(4)]), anchor, lam=1e-9)
    batch = rows(3)[0]
    with torch.inference_mode():
        wanted, found, far = (model(**batch).last_hidden_state for model in (expert, merged, anchor))
    mask = batch["attention_mask"].bool()
    assert (found - wanted)[mask].abs().max() < 1e-3
    assert (far - wanted)[mask].abs().max() > 0.3


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_drift_that_the_maps_cannot_see_is_made_up_for_at_the_residual_stream(kind: str) -> None:
    # The merged model's embeddings are off by a constant, which biases can take back: with the residual target they do.
    expert = encoder(kind, 1)
    shifted = copy.deepcopy(expert)
    with torch.no_grad():
        shifted.get_submodule("embeddings.LayerNorm").bias.add_(torch.linspace(-1, 1, 8))

    def error(model_type: str) -> float:
        merged = copy.deepcopy(shifted)
        run(walk_of(model_type, merged, [expert, expert], [rows(3), rows(4)]), shifted, lam=1e-6)
        batch = rows(3)[0]
        with torch.inference_mode():
            gap = merged(**batch).last_hidden_state - expert(**batch).last_hidden_state
        return float(gap[batch["attention_mask"].bool()].square().mean())

    assert error(kind) < 0.3 * error("an architecture whose residual stream is not known")


def test_moments_are_of_what_the_merged_model_itself_reads() -> None:
    experts, anchor = [encoder("bert", 1), encoder("bert", 2)], encoder("bert", 3)
    batches = [rows(5), rows(6)]
    merged = copy.deepcopy(anchor)
    moments = run(walk_of("bert", merged, experts, batches), anchor, lam=0.1)
    # Every input was observed after all that precedes it was solved, so the solved model still reads the same.
    for group in ("encoder.layer.1.attention.self.query", "encoder.layer.2.output.dense", "pooler.dense"):
        wanted = 0.0
        for task in batches:
            read = torch.cat([inputs_of(merged, group, batch) for batch in task]).double()
            read = torch.cat([read, torch.ones(len(read), 1, dtype=torch.float64)], dim=1)
            wanted = wanted + read.T @ read / len(read)
        torch.testing.assert_close(moments[group].gram, wanted, rtol=1e-4, atol=1e-4)


def test_the_cross_moment_is_of_the_experts_answers_on_their_own_inputs() -> None:
    experts, anchor = [encoder("bert", 1), encoder("bert", 2)], encoder("bert", 3)
    batches = [rows(5), rows(6)]
    merged = copy.deepcopy(anchor)
    name = "encoder.layer.1.attention.self.key"
    moments = run(walk_of("bert", merged, experts, batches), anchor, lam=0.1)["encoder.layer.1.attention.self.query"]
    wanted = 0.0
    for expert, task in zip(experts, batches, strict=True):
        read = torch.cat([inputs_of(merged, name, batch) for batch in task]).double()
        answers = torch.cat([expert.get_submodule(name)(inputs_of(expert, name, batch)) for batch in task]).double()
        read = torch.cat([read, torch.ones(len(read), 1, dtype=torch.float64)], dim=1)
        wanted = wanted + answers.T @ read / len(read)
    torch.testing.assert_close(moments.cross[name], wanted.detach(), rtol=1e-4, atol=1e-4)


def inputs_of(model: torch.nn.Module, name: str, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    return seen[0][batch["attention_mask"].bool()] if seen[0].ndim == 3 else seen[0]


def chain(layers: list[int | None]) -> list[LinearMap]:
    names = [f"m{place}" if layer is None else f"stack.layer.{layer}.m{place}" for place, layer in enumerate(layers)]
    return [LinearMap(name, 2, 2, name, "other", layer) for name, layer in zip(names, layers, strict=True)]


def test_units_follow_the_layers_and_keep_what_stands_outside() -> None:
    maps = chain([None, 0, 0, 1, None])
    assert [(unit.name, len(unit.groups)) for unit in units_of(maps)] == [
        ("before the layers", 1),
        ("stack.layer.0", 2),
        ("stack.layer.1", 1),
        ("after the layers", 1),
    ]


@pytest.mark.parametrize("layers", [[0, None, 1], [1, 0], [0, 1, 0]])
def test_an_order_that_cannot_be_walked_is_refused(layers: list[int | None]) -> None:
    with pytest.raises(CheckpointError, match=r"set regression\.mode to module-wise"):
        units_of(chain(layers))


def test_layers_that_are_not_a_chain_are_refused() -> None:
    class Skipping(BertModel):
        def forward(self, **inputs: Any) -> Any:
            hidden = self.embeddings(inputs["input_ids"])
            for layer in self.encoder.layer:
                hidden = layer(hidden) + hidden
            return hidden

    torch.manual_seed(0)
    model = Skipping(BertConfig(**BERT), add_pooling_layer=False).eval()
    walk = walk_of("bert", model, [copy.deepcopy(model)] * 2, [rows(1), rows(2)])
    with pytest.raises(CheckpointError, match="is not fed by the layer before it alone"):
        next(walk.moments(walk.units[0], SilentReporter().start("", 1)))
