"""How strong the prior should be, told by the regression's own data: the marginal likelihood, in closed form.

With `D_t = W_t − W_a` the model of one map of `m` outputs is `X_t W_tᵀ ~ N(X_t Wᵀ, β⁻¹)` and `W ~ N(W_a, α⁻¹)`, rows of
expert `t` weighted by one over their number. `W` integrates out, and `β`, whose most probable value is
`m N / R(λ̄)`, drops out as well, which leaves one unknown, `λ̄ = α/β`:

    log p(λ̄) = −(m N / 2) · (log(2π R(λ̄) / (m N)) + 1) − (m / 2) Σ_j log(1 + s_j/λ̄)
    R(λ̄) = C − Σ_j ‖P_j‖² / (s_j + λ̄)        C = Σ_t tr(D_t G_t D_tᵀ)

`s_j` and `P_j` are the eigenvalues of `Σ G_t` and the columns of `P = [Σ D_t G_t] U`, both in the posterior already,
and `N` is the number of rows of all experts. `R` is what the best compromise leaves unexplained, the prior's cost
included: the smaller `λ`, the less, and the sum is the price of so much freedom (MacKay, "Bayesian interpolation",
1992). No row is looked at, so it needs no data beyond the Gram matrices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bmm.errors import BMMError
from bmm.regression.posterior import Posterior

_GRID = 61
_GOLDEN = (math.sqrt(5) - 1) / 2
_TOLERANCE = 1e-4
# R is a difference of two sums that cancel where the experts agree; below this share of C it is rounding.
_ROUNDING = 1e-13


@dataclass(frozen=True)
class Evidence:
    """The marginal likelihood of one map as a function of the relative prior strength `λ`.

    Attributes:
        eigenvalues: `s` (in,), float64, of the sum of Gram matrices.
        trace: its trace.
        pull: `‖P_j‖²` for each direction (in,), float64, of the posterior's projection `P`.
        outputs: rows of the map's weight.
        energy: `C`, from `bmm.regression.posterior.residual_and_energy`.
        rows: `N`, of all experts.
    """

    eigenvalues: Tensor
    trace: float
    pull: Tensor
    outputs: int
    energy: float
    rows: int

    @classmethod
    def of(cls, posterior: Posterior, energy: float, rows: int) -> Evidence:
        """Return the evidence of a map with this posterior, without holding on to it."""
        spectrum = posterior.spectrum
        outputs = posterior.anchor.shape[0]
        return cls(spectrum.eigenvalues, spectrum.trace, posterior.projection.square().sum(0), outputs, energy, rows)

    def log(self, lam: float) -> float:
        """Return `log p(λ)`, with `λ̄ = λ · tr(Σ G_t)/in`.

        Where no expert differs from the anchor, nothing is left to explain and only the price counts; where every Gram
        is zero it is 0, whatever `λ`.

        Raises:
            BMMError: `lam` is not positive and finite.
        """
        if not 0 < lam < math.inf:
            raise BMMError(f"the evidence is of a positive, finite prior strength, not of {lam}")
        if self.trace == 0:
            return 0.0
        strength = lam * self.trace / self.eigenvalues.numel()
        price = self.outputs / 2 * float(torch.log1p(self.eigenvalues / strength).sum())
        if self.energy <= 0:
            return -price
        explained = float((self.pull / (self.eigenvalues + strength)).sum())
        left = max(self.energy - explained, _ROUNDING * self.energy)
        count = self.outputs * self.rows
        return -count / 2 * (math.log(2 * math.pi * left / count) + 1) - price


def most_probable(maps: Sequence[Evidence], log10_lambda: tuple[float, float]) -> float:
    """Return the `λ` that the maps together make most probable, between two ends, to four digits.

    A grid finds the neighbourhood (the evidence may have several peaks), a golden-section search the place in it.

    Raises:
        BMMError: there are no maps.
    """
    if not maps:
        raise BMMError("a prior strength was asked for of no maps")

    def at(exponent: float) -> float:
        return sum(map_.log(10.0**exponent) for map_ in maps)

    low, high = log10_lambda
    grid = [low + step * (high - low) / (_GRID - 1) for step in range(_GRID)]
    values = [at(exponent) for exponent in grid]
    best = values.index(max(values))
    left, right = grid[max(best - 1, 0)], grid[min(best + 1, _GRID - 1)]
    one, two = right - _GOLDEN * (right - left), left + _GOLDEN * (right - left)
    first, second = at(one), at(two)
    while right - left > _TOLERANCE:
        if first >= second:
            right, two, second = two, one, first
            one = right - _GOLDEN * (right - left)
            first = at(one)
        else:
            left, one, first = one, two, second
            two = left + _GOLDEN * (right - left)
            second = at(two)
    place = (left + right) / 2
    # The peak may be the end of the range itself.
    exponent = max((place, grid[best]), key=at)
    return float(f"{10.0**exponent:.4g}")
