"""Weights held in memory, for every anchor test."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

SHAPES = {"map.weight": (6, 9), "tall.weight": (9, 4), "map.bias": (6,), "embedding.weight": (7, 4)}
LINEAR = ("map.weight", "tall.weight")


@dataclass(frozen=True)
class Whole:
    """A linear map whose matrix is a parameter as it stands."""

    module: str

    def part(self, parameter):
        return parameter


class MemoryWeights:
    """A base and experts as dictionaries; counts how many expert tensors are alive at once."""

    def __init__(self, base, experts, linear=LINEAR):
        self.bases, self.experts, self.linear = base, experts, linear
        self.alive = self.most_alive = 0

    @property
    def count(self):
        return len(self.experts)

    def names(self):
        return tuple(self.bases)

    def base(self, name):
        return self.bases[name]

    def expert(self, index, name):
        tensor = self.experts[index][name].clone()
        self.alive += 1
        self.most_alive = max(self.most_alive, self.alive)
        weakref.finalize(tensor, self._gone)
        return tensor

    def _gone(self):
        self.alive -= 1

    def maps(self, name):
        return [Whole(name)] if name in self.linear else []

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]):
        """Return the same weights with `function` applied to every expert's task vectors."""
        experts = [
            {name: self.bases[name] + function(expert[name] - self.bases[name]) for name in expert}
            for expert in self.experts
        ]
        return MemoryWeights(self.bases, experts, self.linear)


def _random_weights(seed=0, experts=3, dtype=torch.float32, shapes=SHAPES, size=0.05):
    generator = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tuned = [
        {name: base[name] + size * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        for _ in range(experts)
    ]
    return MemoryWeights(
        {name: tensor.to(dtype) for name, tensor in base.items()},
        [{name: tensor.to(dtype) for name, tensor in expert.items()} for expert in tuned],
    )


@pytest.fixture(scope="session")
def random_weights():
    """Return a function that draws weights from a seed."""
    return _random_weights


@pytest.fixture(scope="session")
def weights_of():
    """Return a function that builds weights from dictionaries."""
    return MemoryWeights


@pytest.fixture(scope="session")
def task_vectors_of():
    """Return a function that gives one tensor's task vectors as float64 numpy arrays."""

    def read(weights, name):
        base = weights.bases[name].double().numpy()
        return [expert[name].double().numpy() - base for expert in weights.experts]

    return read


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Tiny matrices gain nothing from threads and lose much to them on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
