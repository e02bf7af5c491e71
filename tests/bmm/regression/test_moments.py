from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bmm.errors import BMMError
from bmm.modules.linear import LinearMap
from bmm.regression.moments import TaskSums, total

MAP = LinearMap("m", 2, 3, "m", "other", None, "m.weight", "m.bias")


def data(seed: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 3, generator=generator), torch.randn(rows, 2, generator=generator)


def sums(tasks: list[tuple[torch.Tensor, torch.Tensor]]) -> TaskSums:
    found = TaskSums([MAP])
    for inputs, targets in tasks:
        found.add(inputs, {"m": targets})
    return found


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4))
def test_each_task_counts_alike_and_the_error_is_that_of_its_rows(seed: int, sizes: list[int]) -> None:
    tasks = [data(seed + place, size) for place, size in enumerate(sizes)]
    moments = total([sums([task]).moments() for task in tasks])
    solution = torch.randn(2, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    wanted = 0.0
    for inputs, targets in tasks:
        rows = torch.cat([inputs.double(), torch.ones(len(inputs), 1, dtype=torch.float64)], dim=1)
        wanted += float((rows @ solution.T - targets.double()).square().sum() / len(rows))
    assert moments.error("m", solution) == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    assert moments.rows == tuple(sizes)


def test_batches_add_up_to_their_task() -> None:
    inputs, targets = data(0, 20)
    parts = sums([(inputs[:7], targets[:7]), (inputs[7:], targets[7:])]).moments()
    whole = sums([(inputs, targets)]).moments()
    torch.testing.assert_close(parts.gram, whole.gram, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parts.cross["m"], whole.cross["m"], rtol=1e-5, atol=1e-6)


def test_an_answer_that_is_not_finite_is_named() -> None:
    inputs, targets = data(0, 5)
    targets[2, 1] = torch.nan
    with pytest.raises(BMMError, match="the inputs or answers of m are not finite"):
        sums([(inputs, targets)]).moments()


def test_a_sum_uses_up_its_parts_and_weighs_them() -> None:
    one, other = (sums([data(seed, 9)]).moments() for seed in (0, 1))
    wanted = one.gram + 3 * other.gram
    cross = one.cross["m"] + 3 * other.cross["m"]
    parts = [one, other]
    found = total(parts, [1.0, 3.0])
    assert parts == []
    assert torch.equal(found.gram, wanted)
    assert torch.equal(found.cross["m"], cross)
    assert found.rows == (9, 9)
    with pytest.raises(BMMError, match="1 sums of moments were given with 2 weights"):
        total([found], [1.0, 2.0])


def test_sums_travel_without_copies_and_can_be_added_to() -> None:
    found = sums([data(0, 12)]).moments()
    buffers: list[pickle.PickleBuffer] = []
    frame = pickle.dumps([(found,)], protocol=5, buffer_callback=buffers.append)
    # Next to nothing beside the arrays themselves, which are where they were.
    assert len(frame) < 1000
    assert sum(buffer.raw().nbytes for buffer in buffers) == found.nbytes
    for sent in ([bytearray(buffer.raw()) for buffer in buffers], [bytes(buffer.raw()) for buffer in buffers]):
        ((arrived,),) = pickle.loads(frame, buffers=sent)  # noqa: S301 - made two lines above
        assert arrived.rows == found.rows
        assert all(torch.equal(arrived.tensors()[name], value) for name, value in found.tensors().items())
        arrived.gram.add_(1.0)


def test_outputs_may_be_solved_some_at_a_time() -> None:
    moments = sums([data(3, 40)]).moments()
    anchor = torch.randn(2, 4, dtype=torch.float64)
    spectrum = moments.spectrum("m")
    whole = moments.posterior(spectrum, "m", anchor).mean(0.1)
    for row in range(2):
        part = moments.of_rows("m", slice(row, row + 1))
        own = part.posterior(spectrum, "m", anchor[row : row + 1]).mean(0.1)
        torch.testing.assert_close(own, whole[row : row + 1])
