"""DARE: drop and rescale, then another merge (Yu et al., arXiv 2311.03099).

Each entry of each task vector is dropped with probability `p`, the survivors are divided by `1 − p`, so that the
expected task vector is the original one:

    τ̃_t = m_t ⊙ τ_t / (1 − p)        m_t ~ Bernoulli(1 − p)

and the thinned experts `W_0 + τ̃_t` are merged by task arithmetic or by TIES, on every floating-point tensor.

A mask is drawn from the recipe's seed, the expert's place in the recipe and the tensor's name alone, so it does not
change when other tensors or experts do. mergekit's `dare_linear` and `dare_ties` differ: what survives is rescaled
until the *tensor's* L1 norm is the original one, instead of by `1/(1 − p)`, and its `dare_ties` elects signs without
trimming by magnitude, which is `density: 1` here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bmm.anchors.interface import Matrix, Treatment, Weights
from bmm.anchors.settings import DARESettings, TaskArithmeticSettings, TIESSettings
from bmm.anchors.task_arithmetic import TaskArithmetic
from bmm.anchors.task_vectors import ScaledAnchor, TaskVectors
from bmm.anchors.ties import TIES
from bmm.digest import digest_text


class DARE(ScaledAnchor):
    """Thins every task vector, then hands the thinned experts to another method."""

    def __init__(self, settings: DARESettings) -> None:
        self.settings = settings
        self._then: TaskArithmetic | TIES
        if settings.then == "ta":
            said = {} if settings.scale is None else {"scale": settings.scale}
            self._then = TaskArithmetic(TaskArithmeticSettings(**said))
        else:
            self._then = TIES(TIESSettings(density=settings.density, scale=settings.scale))

    @property
    def scale(self) -> float:
        """What the merged task vector is multiplied by."""
        return self._then.scale

    def prepare(self, weights: Weights) -> None:
        """Let the method that follows look at the thinned experts."""
        self._then.prepare(self._thinned(weights))

    def direction(self, name: str, weights: Weights) -> tuple[Tensor | None, Treatment]:
        """Return the direction of the method that follows; see `ScaledAnchor.direction`."""
        return self._then.direction(name, self._thinned(weights))

    def _thinned(self, weights: Weights) -> Thinned:
        return Thinned(weights, self.settings.drop, self.settings.seed)


@dataclass(frozen=True)
class Thinned:
    """Weights whose experts' task vectors are thinned: dropped with probability `drop`, the rest rescaled."""

    weights: Weights
    drop: float
    seed: int

    @property
    def count(self) -> int:
        """Number of experts."""
        return self.weights.count

    def names(self) -> tuple[str, ...]:
        """Return the canonical names, in one fixed order."""
        return self.weights.names()

    def base(self, name: str) -> Tensor:
        """Return the base model's tensor, in its stored dtype."""
        return self.weights.base(name)

    def maps(self, name: str) -> Sequence[Matrix]:
        """Return the linear maps whose matrices the tensor holds."""
        return self.weights.maps(name)

    def expert(self, index: int, name: str) -> Tensor:
        """Return one thinned expert's tensor, float64.

        Raises:
            CheckpointError: the tensor holds NaN or infinities, or has another shape than the base's.
        """
        vectors = TaskVectors(name, self.weights)
        vector = vectors.at(index)
        return vectors.base + vector * self.mask(index, name, vector.shape) / (1 - self.drop)

    def mask(self, index: int, name: str, shape: torch.Size) -> Tensor:
        """Return which entries of one expert's task vector survive, as booleans."""
        generator = torch.Generator().manual_seed(int(digest_text(f"dare {self.seed} {index} {name}")[:15], 16))
        return torch.rand(shape, generator=generator, dtype=torch.float64) >= self.drop
