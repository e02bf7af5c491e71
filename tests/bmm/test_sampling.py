from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from bmm.assembly import Assembler
from bmm.modules.linear import LinearMap
from bmm.problems import Problem, Problems, Sums
from bmm.regression.evidence import Evidence
from bmm.regression.posterior import decompose, factor
from bmm.regression.sample import deviation, effective_rows, noise_variance, settled_directions, standard_normal
from bmm.sampling import Sampler, module_wise_noise
from bmm.search.setting import Setting

OUT, IN, COUNTS = 3, 4, (30, 50)
QUERY = LinearMap("a.query", OUT, IN, "a.query", "qkv", 0, "a.query.weight")
KEY = LinearMap("a.key", OUT, IN, "a.query", "qkv", 0, "a.key.weight")
MAPS = (QUERY, KEY)


class Case:
    """Two maps of one input, two experts, and the rows that their Grams are made of."""

    def __init__(self, counts: tuple[int, ...] = COUNTS) -> None:
        rng = np.random.default_rng(0)
        self.counts = counts
        self.count = len(counts)
        self.rows = [rng.normal(size=(rows, IN)) for rows in counts]
        self.grams = [torch.from_numpy(rows.T @ rows / max(len(rows), 1)) for rows in self.rows]
        self.weights = [
            {map_.weight: torch.from_numpy(rng.normal(size=(OUT, IN))) for map_ in MAPS} for _ in range(2 + self.count)
        ]
        self.anchor, self.start = self.weights[-1], self.weights[-2]

    def expert(self, index: int, name: str) -> torch.Tensor:
        return self.weights[index][name]

    def gram(self, index: int, _group: str, sums: Sums) -> torch.Tensor:
        return self.grams[index] * dict(sums[1]).get(str(index), 1.0)

    def assembler(self) -> Assembler:
        def factored(_members: Sequence[LinearMap], sums: Sums) -> list[Problem]:
            grams = [self.gram(index, "a.query", sums) for index in range(self.count)]
            spectrum = decompose(sum(grams[1:], grams[0]), where="a.query")
            problems = []
            for map_ in MAPS:
                name, mean = map_.weight, self.anchor[map_.weight]
                pull = sum((self.expert(t, name) - mean) @ gram for t, gram in enumerate(grams))
                posterior = factor(spectrum, mean, pull)
                evidence = Evidence.of(posterior, 1.0, sum(self.counts))
                problems.append(Problem(map_, posterior, self.start[name], evidence))
            return problems

        return Assembler(Problems(MAPS, factored, biases=False, keep=True), self.anchor.__getitem__)

    def noise(self, settings: dict[str, Setting]):
        return module_wise_noise(self.assembler(), settings, self, self.gram, lambda t, _: self.counts[t])


def test_noise_is_that_of_the_residuals() -> None:
    made, settings = Case(), {"a.query": Setting(0.1, 1.0), "a.key": Setting(1.0, 0.9)}
    noise = made.noise(settings)
    for module, problem in made.assembler().problems.items():
        lam = settings[module].lam
        mean = problem.posterior.mean(lam).numpy()
        error = sum(
            ((rows @ (made.expert(t, problem.map.weight).numpy() - mean).T) ** 2).mean(axis=0)
            for t, rows in enumerate(made.rows)
        )
        wanted = noise_variance(problem.posterior, lam, torch.from_numpy(error), effective_rows(COUNTS), 2)
        torch.testing.assert_close(noise[module].variance, wanted)
        assert noise[module].rows == effective_rows(COUNTS)
        assert noise[module].settled == settled_directions(problem.posterior, lam)


def test_the_width_does_not_depend_on_the_unit_that_tasks_are_weighed_in() -> None:
    made = Case()

    def width(query: float, key: float, scale: float = 1.0) -> dict[str, torch.Tensor]:
        weights = [(("0", weight), ("1", weight)) for weight in (query, key)]
        settings = {
            map_.module: Setting(0.1, 1.0, scale, weights=pair) for map_, pair in zip(MAPS, weights, strict=True)
        }
        noise = made.noise(settings)
        return {module: part.variance / dict(settings[module].weights)["0"] for module, part in noise.items()}

    one, other = width(1.0, 1.0), width(4.0, 0.5)
    # Of a covariance that is the noise's variance over the sum of Gram matrices, both are in the weights' unit.
    assert all(torch.allclose(one[module], other[module]) for module in one)
    # The residuals are those of the anchor that the maps were solved around.
    assert not torch.allclose(one["a.key"], width(1.0, 1.0, 0.5)["a.key"])


def test_a_draw_is_assembled_as_the_mean_is() -> None:
    made, settings = Case(), {"a.query": Setting(0.1, 1.0), "a.key": Setting(1.0, 0.9)}
    noise = made.noise(settings)
    drawn = Sampler(made.assembler(), settings, noise).weights(3, 1)
    for module, problem in made.assembler().problems.items():
        lam, gamma = settings[module].lam, settings[module].gamma
        normal = standard_normal(3, 1, module, (OUT, IN))
        one = problem.posterior.mean(lam) + deviation(
            problem.posterior, lam, noise[module].variance, noise[module].rows, normal
        )
        wanted = made.start[problem.map.weight] + gamma * (one - made.start[problem.map.weight])
        torch.testing.assert_close(drawn[problem.map.weight], wanted.float())


def test_a_map_that_keeps_its_anchor_is_not_drawn() -> None:
    made, settings = Case(), {"a.query": Setting(math.inf, 1.0), "a.key": Setting(1.0, 1.0)}
    noise = made.noise(settings)
    assert noise.keys() == {"a.key"}
    drawn = Sampler(made.assembler(), settings, noise).weights(0, 0)
    assert torch.equal(drawn["a.query.weight"], made.anchor["a.query.weight"].float())


def test_a_task_without_rows_says_nothing_of_the_noise() -> None:
    settings = {map_.module: Setting(0.1, 1.0) for map_ in MAPS}
    assert Case((30, 0)).noise(settings)["a.key"].rows == pytest.approx(30)
    assert Case((0, 0)).noise(settings) == {}
