"""Leads: channels are fitted exactly, and a walk that fits them differs from the product's by nothing else."""

from __future__ import annotations

import copy

import torch
from architectures import batches, encoder
from benchmarks.leads import Lead, LeadWalk, _ChannelSums
from hypothesis import given, settings
from hypothesis import strategies as st

from bmm.modules.linear import discover


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), strength=st.floats(0.01, 10))
def test_a_channel_is_the_regression_of_one_input_and_a_constant(seed: int, strength: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    gain, shift = torch.randn(2, 3, generator=draw, dtype=torch.float64)
    tasks = [[torch.randn(rows, 3, generator=draw, dtype=torch.float64) for _ in range(2)] for rows in (7, 11)]
    sums = _ChannelSums()
    for x, y in tasks:
        sums.begin()
        sums.add(x[:4], y[:4])
        sums.add(x[4:], y[4:])
    found = torch.stack(sums.fit(gain, shift, strength))
    for channel in range(3):
        rows = [torch.stack([x[:, channel], torch.ones(len(x), dtype=torch.float64)], 1) for x, _ in tasks]
        gram = sum((row.T @ row / len(row) for row in rows), torch.zeros(2, 2, dtype=torch.float64))
        cross = sum((row.T @ y[:, channel] / len(row) for row, (_, y) in zip(rows, tasks, strict=True)), 0)
        prior = torch.stack([gain[channel], shift[channel]])
        ridge = strength * gram.trace() / 2 * torch.eye(2, dtype=torch.float64)
        wanted = prior + torch.linalg.solve(gram + ridge, cross - gram @ prior)
        torch.testing.assert_close(found[:, channel], wanted)


def walked(lead: Lead, family: str) -> dict[str, torch.Tensor]:
    merged, experts = encoder(family, 1), [encoder(family, 2), encoder(family, 3)]
    prior = copy.deepcopy(merged)
    rows = [batches(family, 5, 6), batches(family, 6, 6)]
    maps = discover(prior, {name: value[:2] for name, value in rows[0][0].items()})
    names = dict(prior.named_parameters())
    walk = LeadWalk(
        merged,
        encoder(family, 4),
        names,
        prior.get_parameter,
        lambda t, name: experts[t].get_parameter(name),
        rows,
        maps,
    )
    found = walk.solve(lead, 0.1)
    return {name: tensor for name, tensor in found.items() if not torch.equal(tensor, prior.get_parameter(name))}


def test_each_lead_changes_what_it_says_and_what_follows() -> None:
    plain = walked(Lead(), "dinov2")
    norms, scales, noise = (
        walked(lead, "dinov2") for lead in (Lead(norms=True), Lead(scales=True), Lead(by_noise=True))
    )
    beyond = {name.rpartition(".")[2] for name in norms.keys() - plain.keys()}
    assert beyond == {"weight", "bias"}
    assert all(".norm" in name for name in norms.keys() - plain.keys())
    assert {name.rpartition(".")[2] for name in scales.keys() - plain.keys()} == {"lambda1"}
    assert noise.keys() == plain.keys()
    for found in (norms, scales, noise):
        assert any(not torch.equal(found[name], plain[name]) for name in plain)
