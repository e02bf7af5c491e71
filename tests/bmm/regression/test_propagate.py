"""The walk against what it must do: reproduce an expert that nothing contradicts, and see what really arrives."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from architectures import CONFIGS, FAMILIES, MIXTURES, NOT_CHAINS, Batch, batches, encoder, hidden_states
from torch import nn

from bmm.errors import BMMError
from bmm.modules.linear import LinearMap, discover
from bmm.modules.tokens import Sample
from bmm.regression.moments import Moments, TaskSums, total, trusted
from bmm.regression.propagate import Walk

# An expert of a mixture is another one wherever a token's two best experts are close: only the plain families can be
# compared state by state.
PLAIN = sorted(set(FAMILIES) - MIXTURES)


def maps_of(model: nn.Module, batch: Batch) -> tuple[LinearMap, ...]:
    return discover(model, {name: value[:2] for name, value in batch.items()})


def walk_of(
    start: nn.Module,
    experts: list[nn.Module],
    rows: list[list[Batch]],
    maps: Any = None,
    sample: Sample | None = None,
    room: int | None = None,
) -> Walk:
    known = [dict(model.named_parameters(remove_duplicate=False)) for model in (*experts, copy.deepcopy(start))]
    names = dict(start.named_parameters())
    scratch = copy.deepcopy(start)
    maps = maps or maps_of(start, rows[0][0])

    def weight(task: int, name: str) -> torch.Tensor:
        return known[task][name]

    return Walk(start, scratch, names, known[-1].__getitem__, weight, rows, maps, sample=sample, room=room)


def run(walk: Walk, merged: nn.Module, anchor: nn.Module, lam: float) -> dict[str, Moments]:
    """Walk to the end, and leave the solved weights in `merged`, whose layers the walk has let go of."""
    found = {}
    solutions = {}
    for unit in walk.units:
        for group, members in unit.groups.items():
            found[group] = moments = trusted(total([found for (found,) in walk.moments(unit.name, group)]), members)
            spectrum = moments.spectrum(group)
            for map_ in members:
                prior = map_.matrix(anchor.get_parameter)
                solutions[map_] = moments.posterior(spectrum, map_.module, prior).mean(lam)
                walk.apply(map_.module, solutions[map_])
        walk.advance(unit.name)
    for name, parameter in merged.named_parameters():
        parameter.data = anchor.get_parameter(name).clone()
    for map_, solution in solutions.items():
        map_.place(solution, merged.get_parameter)
    return found


def agree_outside(maps: Any, expert: nn.Module, anchor: nn.Module) -> None:
    """Give the anchor the expert's values of all that is not a linear map: the walk leaves it to the anchor."""
    linear = {name for map_ in maps for name in map_.parameters}
    for name, parameter in anchor.named_parameters():
        if name not in linear:
            parameter.copy_(expert.get_parameter(name))


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_that_agree_are_reproduced_from_any_anchor(family: str) -> None:
    expert, anchor = encoder(family, 1), encoder(family, 2)
    rows = [batches(family, 3, 12), batches(family, 4, 12)]
    agree_outside(maps_of(anchor, rows[0][0]), expert, anchor)
    merged = copy.deepcopy(anchor)
    run(walk_of(merged, [expert, expert], rows), merged, anchor, lam=1e-9)
    wanted, found, far = (hidden_states(model, rows[0][0]) for model in (expert, merged, anchor))
    scale = wanted.abs().mean()
    assert (far - wanted).abs().mean() > 0.2 * scale
    gap = (found - wanted).abs()
    if family in MIXTURES:
        assert gap.median() < 1e-2 * scale
    else:
        assert gap.max() < 1e-2 * scale


@pytest.mark.parametrize("family", ["bert", "dinov2", "llama", "gpt2", "t5-encoder"])
def test_a_drift_that_the_maps_cannot_see_is_made_up_for_at_the_residual_stream(family: str) -> None:
    # The merged model's first map is kept wrong, so what enters the layers is off; writers can take much of it back.
    expert = encoder(family, 1)
    shifted = copy.deepcopy(expert)
    tables = [module for module in shifted.modules() if isinstance(module, nn.Embedding | nn.Conv2d)]
    tables[0].weight.add_(0.3 * torch.randn(tables[0].weight.shape, generator=torch.Generator().manual_seed(0)))
    rows = [batches(family, 3, 12), batches(family, 4, 12)]
    maps = [map_ for map_ in maps_of(shifted, rows[0][0]) if map_.layer is not None]

    def error(known: bool) -> float:
        merged = copy.deepcopy(shifted)
        given = maps if known else [replace(map_, stream=False) for map_ in maps]
        run(walk_of(merged, [expert, expert], rows, given), merged, shifted, lam=1e-6)
        return float((hidden_states(merged, rows[0][0]) - hidden_states(expert, rows[0][0])).square().mean())

    assert error(True) < 0.9 * error(False)


def inputs_of(model: nn.Module, name: str, batch: Batch) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    return seen[0][batch["attention_mask"].bool()] if seen[0].ndim == 3 else seen[0]


def test_moments_are_of_what_the_merged_model_itself_reads() -> None:
    experts, anchor = [encoder("bert", 1), encoder("bert", 2)], encoder("bert", 3)
    rows = [batches("bert", 5), batches("bert", 6)]
    merged = copy.deepcopy(anchor)
    moments = run(walk_of(merged, experts, rows), merged, anchor, lam=0.1)
    # Every input was observed after all that precedes it was solved, so the solved model still reads the same.
    for group in ("encoder.layer.0.attention.self.query", "encoder.layer.1.output.dense", "pooler.dense"):
        wanted = 0.0
        for task in rows:
            read = torch.cat([inputs_of(merged, group, batch) for batch in task]).double()
            read = torch.cat([read, torch.ones(len(read), 1, dtype=torch.float64)], dim=1)
            wanted = wanted + read.T @ read / len(read)
        torch.testing.assert_close(moments[group].gram, wanted, rtol=1e-4, atol=1e-4)


def test_the_cross_moment_is_of_the_experts_answers_on_their_own_inputs() -> None:
    experts, anchor = [encoder("bert", 1), encoder("bert", 2)], encoder("bert", 3)
    rows = [batches("bert", 5), batches("bert", 6)]
    merged = copy.deepcopy(anchor)
    name = "encoder.layer.1.attention.self.key"
    moments = run(walk_of(merged, experts, rows), merged, anchor, lam=0.1)["encoder.layer.1.attention.self.query"]
    cross, power = 0.0, 0.0
    for expert, task in zip(experts, rows, strict=True):
        read = torch.cat([inputs_of(merged, name, batch) for batch in task]).double()
        answers = torch.cat([expert.get_submodule(name)(inputs_of(expert, name, batch)) for batch in task]).double()
        read = torch.cat([read, torch.ones(len(read), 1, dtype=torch.float64)], dim=1)
        cross = cross + answers.T @ read / len(read)
        power = power + answers.square().mean(0)
    torch.testing.assert_close(moments.cross[name], cross, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moments.power[name], power, rtol=1e-4, atol=1e-4)


def sampled_of(model: nn.Module, name: str, task: list[Batch], sample: Sample) -> torch.Tensor:
    """Return what reaches a map in the rows of the tokens that are drawn."""
    found = []
    for place, batch in enumerate(task):
        mask = batch["attention_mask"].bool()
        found.append(inputs_of(model, name, batch)[sample.drawn(mask, place)[mask]])
    return torch.cat(found).double()


def test_of_a_sample_both_models_rows_are_of_the_same_tokens() -> None:
    expert, anchor, sample = encoder("bert", 1), encoder("bert", 3), Sample(2, 9)
    task = batches("bert", 5)
    merged = copy.deepcopy(anchor)
    walk = walk_of(merged, [expert], [task], sample=sample)
    name = "encoder.layer.1.attention.self.key"
    moments = run(walk, merged, anchor, lam=0.1)["encoder.layer.1.attention.self.query"]
    read = sampled_of(merged, name, task, sample)
    assert len(read) == 2 * 8 * len(task)
    answers = expert.get_submodule(name)(sampled_of(expert, name, task, sample).float()).double()
    read = torch.cat([read, torch.ones(len(read), 1, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(moments.gram, read.T @ read / len(read), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moments.cross[name], answers.T @ read / len(read), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["bert", "openclip", "vit"])
def test_few_tokens_of_many_rows_reproduce_an_expert_too(family: str) -> None:
    # Wherever answers, inputs and streams were of different tokens, no weights could.
    expert, anchor = encoder(family, 1), encoder(family, 2)
    rows = [batches(family, 3, 12)]
    agree_outside(maps_of(anchor, rows[0][0]), expert, anchor)
    merged = copy.deepcopy(anchor)
    run(walk_of(merged, [expert], rows, sample=Sample(2)), merged, anchor, lam=1e-9)
    wanted, found = (hidden_states(model, rows[0][0]) for model in (expert, merged))
    assert (found - wanted).abs().max() < 1e-2 * wanted.abs().mean()


@pytest.mark.parametrize("family", ["bert", "mixtral", "vit"])
def test_a_sample_of_all_tokens_changes_no_byte(family: str) -> None:
    expert, anchor = encoder(family, 1), encoder(family, 2)
    rows = [batches(family, 3, 2)]
    plain, sampled = (walk_of(copy.deepcopy(anchor), [expert], rows, sample=sample) for sample in (None, Sample(16, 4)))
    for unit in plain.units:
        for group in unit.groups:
            ((one,),), ((two,),) = (walk.moments(unit.name, group) for walk in (plain, sampled))
            assert one.rows == two.rows
            assert torch.equal(one.gram, two.gram)
            assert all(torch.equal(one.cross[name], two.cross[name]) for name in one.cross)
        for walk in (plain, sampled):
            walk.advance(unit.name)


@pytest.mark.parametrize("family", PLAIN)
def test_a_writers_target_makes_the_merged_stream_the_experts(family: str) -> None:
    # With the expert's own answer as solution of every map that does not write, the stream after a writer is checked
    # by its moments: the error of the best solution is that of a plain least-squares fit, which is below any other's.
    expert, anchor = encoder(family, 1), encoder(family, 2)
    rows = [batches(family, 3)]
    maps = maps_of(anchor, rows[0][0])
    agree_outside(maps, expert, anchor)
    writers = [map_ for map_ in maps if map_.stream]
    assert bool(writers) == (family != "gemma2"), "Gemma 2 normalises what it adds"
    merged = copy.deepcopy(anchor)
    moments = run(walk_of(merged, [expert], rows), merged, anchor, lam=1e-9)
    for map_ in writers:
        found = moments[map_.input_group]
        solution = map_.matrix(merged.get_parameter)
        assert found.error(map_.module, solution) < 1e-4 * float(found.power[map_.module].sum())


@pytest.mark.parametrize("family", sorted(MIXTURES))
def test_an_expert_of_a_mixture_is_regressed_on_the_tokens_that_reach_it(family: str) -> None:
    experts, anchor = [encoder(family, 1), encoder(family, 2)], encoder(family, 3)
    rows = [batches(family, 5), batches(family, 6)]
    merged = copy.deepcopy(anchor)
    walk = walk_of(merged, experts, rows)
    moments = run(walk, merged, anchor, lam=0.1)
    groups = [name for name in moments if ".experts.gate_up_proj." in name and name.startswith("layers.1.")]
    tokens = sum(int(batch["attention_mask"].sum()) for task in rows for batch in task)
    assert len(groups) == 3
    assert sum(sum(moments[name].rows) for name in groups) == 2 * tokens
    assert all(moments[name].rows == moments[name.replace("gate_up", "down")].rows for name in groups)


def test_an_expert_of_a_mixture_that_too_few_tokens_reach_keeps_the_anchor() -> None:
    map_ = LinearMap("e.0", 2, 3, "e.0", "mlp-in", 0, "e", index=0)
    gram = torch.eye(3, dtype=torch.float64)
    cross = {"e.0": torch.ones(2, 3, dtype=torch.float64)}
    power = {"e.0": torch.ones(2, dtype=torch.float64)}
    anchor = torch.full((2, 3), 7.0, dtype=torch.float64)
    few, enough = (trusted(Moments(gram, cross, power, rows), [map_]) for rows in ((8, 7), (8, 8)))
    assert torch.equal(few.posterior(few.spectrum(""), "e.0", anchor).mean(0.1), anchor)
    assert not torch.allclose(enough.posterior(enough.spectrum(""), "e.0", anchor).mean(0.1), anchor)


@pytest.mark.parametrize("family", ["bert", "dinov2", "llama", "mixtral", "openclip", "t5"])
def test_answers_that_are_asked_for_again_are_the_same_to_the_last_byte(family: str) -> None:
    experts = [encoder(family, seed) for seed in (1, 2)]
    rows = [batches(family, seed, count=2) for seed in (3, 4)]
    found: list[tuple[dict[str, Moments], dict[str, nn.Parameter]]] = []
    for room in (None, 0):
        anchor = encoder(family, 5)
        merged = copy.deepcopy(anchor)
        walk = walk_of(merged, experts, rows, room=room)
        found.append((run(walk, merged, anchor, 0.1), dict(merged.named_parameters())))
    (kept, weights), (again, others) = found
    for group, moments in kept.items():
        for name, tensor in moments.tensors().items():
            assert torch.equal(again[group].tensors()[name], tensor), (group, name)
    for name, tensor in weights.items():
        assert torch.equal(others[name], tensor), name


def test_no_more_answers_are_kept_than_there_is_room_for() -> None:
    experts = [encoder("bert", seed) for seed in (1, 2)]
    rows = [batches("bert", seed, count=3) for seed in (3, 4)]
    kept = {}
    for room in (None, 0, 1, 120_000):
        walk = walk_of(encoder("bert", 5), experts, rows, room=room)
        unit = walk.units[0]
        walk.moments(unit.name, next(iter(unit.groups)))
        steps = [step for task in walk._tasks for step in task]
        kept[room] = [step.nbytes for step in steps if step.asked]
        assert not any(step.answers or step.totals for step in steps if not step.asked)
    assert [len(sizes) for sizes in (kept[None], kept[0], kept[1])] == [6, 0, 1]
    # One batch may go beyond it.
    assert 1 < len(kept[120_000]) < 6
    assert sum(kept[120_000][:-1]) < 120_000 <= sum(kept[120_000])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_output_head_is_walked_without_an_answer(family: str) -> None:
    def language(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        config = CONFIGS[family]()
        config.tie_word_embeddings, config.vocab_size = False, 70
        return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)

    expert, rows = language(1), batches(family, 3, count=2)
    merged = language(2)
    walk = walk_of(merged, [expert], [rows])
    head = walk.units[-1]
    for unit in walk.units[:-1]:
        for group, members in unit.groups.items():
            walk.moments(unit.name, group)
            for map_ in members:
                walk.apply(map_.module, map_.matrix(merged.get_parameter))
        walk.advance(unit.name)
    ((found,),) = walk.moments(head.name, next(iter(head.groups)))
    plain = TaskSums(head.maps)
    for step, batch in zip(walk._tasks[0], rows, strict=True):
        assert not step.asked
        kept = batch["attention_mask"].bool()
        read = language(2).base_model(**batch).last_hidden_state
        plain.add(read[kept], {"lm_head": expert(**batch).logits[kept]})
    for name, tensor in plain.moments().tensors().items():
        torch.testing.assert_close(found.tensors()[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", sorted(NOT_CHAINS))
def test_layers_that_are_no_chain_are_walked_from_the_networks_beginning(family: str) -> None:
    rows = [batches(family, 3, 2)]
    walk = walk_of(encoder(family, 1), [encoder(family, 2)], rows)
    assert walk.layers == ()


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - NOT_CHAINS))
def test_a_chain_of_layers_is_recognised(family: str) -> None:
    rows = [batches(family, 3, 2)]
    walk = walk_of(encoder(family, 1), [encoder(family, 2)], rows)
    assert len(walk.layers) == 2


def test_a_map_that_no_row_reaches_is_named() -> None:
    model = encoder("bert", 1)
    rows = [batches("bert", 3, 2)]
    maps = [*maps_of(model, rows[0][0])]
    maps[0] = replace(maps[0], weight="pooler.dense.bias")
    walk = walk_of(model, [encoder("bert", 2)], rows, maps)
    with pytest.raises(BMMError, match=r"the map encoder\.layer\.0\.attention\.self\.query was not reached"):
        walk.moments(walk.units[0].name, "encoder.layer.0.attention.self.query")
