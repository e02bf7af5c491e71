"""The posterior mean of one linear map under an anchor prior: one eigendecomposition, any prior strength.

With Gram matrices `G_t` (in, in), experts' weights `W_t` (out, in) and the anchor's weight `W_a` (out, in):

    Ŵ(λ) = W_a + [Σ_t (W_t − W_a) G_t] (Σ_t G_t + λ̄ I)⁻¹        λ̄ = λ · tr(Σ_t G_t)/in

Everything is float64 inside, whatever comes in. Which weights and Grams belong together, and how a Gram is
collected, is not decided here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

from bmm.errors import BMMError

RELATIVE_CUTOFF = torch.finfo(torch.float32).eps
"""A direction whose `s + λ̄` is at or below this share of the largest eigenvalue `s` counts as never seen.

Grams are sums of float32 products, so smaller eigenvalues are rounding: a singular Gram shows some around
1e-8 of the largest. Dividing by them would blow rounding up; such directions keep the anchor instead.
"""

_ASYMMETRY = 1e-5
NEGATIVE = 1e-5
"""An eigenvalue below minus this share of the largest is no rounding."""


@dataclass(frozen=True)
class Spectrum:
    """`Σ_t G_t = U diag(s) Uᵀ`, float64: eigenvectors (in, in), eigenvalues (in,) ascending and >= 0."""

    eigenvectors: Tensor
    eigenvalues: Tensor
    trace: float


@dataclass(frozen=True)
class Posterior:
    """The posterior mean of one linear map as a function of the relative prior strength `λ`.

    `anchor` (out, in) and `projection` `P = [Σ (W_t − W_a) G_t] U` (out, in), both float64. Maps that read
    the same input share one `Spectrum`.
    """

    spectrum: Spectrum
    anchor: Tensor
    projection: Tensor

    def mean(self, lam: float) -> Tensor:
        """Return `W_a + (P / (s + λ̄)) Uᵀ` (out, in), float64.

        `lam = inf`, or a Gram that is zero, returns the anchor bit for bit. `lam = 0` uses the
        pseudo-inverse: directions that no input had (see `RELATIVE_CUTOFF`) keep the anchor.

        Raises:
            BMMError: `lam` is negative or NaN.
        """
        _require_strength(lam)
        if math.isinf(lam) or self.spectrum.trace == 0:
            return self.anchor.clone()
        denominators, seen = self.denominators(lam)
        coefficients = self.projection / torch.where(seen, denominators, 1.0)
        return self.anchor + torch.where(seen, coefficients, 0.0) @ self.spectrum.eigenvectors.T

    def near_mean(self, lam: float) -> Tensor:
        """Return `mean` (out, in) by a product in float32, in half the time or less: what a trial is evaluated with.

        The coefficients are float64, the product and the sum float32: the pull away from the anchor is right to about
        1e-6 of its norm, which a float32 model's own rounding is no better than. What is published is `mean`.

        Raises:
            BMMError: `lam` is negative or NaN.
        """
        _require_strength(lam)
        if math.isinf(lam) or self.spectrum.trace == 0:
            return self.anchor.to(torch.float32)
        denominators, seen = self.denominators(lam)
        shrunk = self.projection * torch.where(seen, 1.0 / torch.where(seen, denominators, 1.0), 0.0)
        pull = shrunk.to(torch.float32) @ self.spectrum.eigenvectors.to(torch.float32).T
        return pull.add_(self.anchor)

    def around(self, anchor: Tensor) -> Posterior:
        """Return the posterior of the same data around another anchor (out, in): one matrix product.

        `P' = P + (W_a − W_a') U diag(s)`, as `Σ (W_t − W_a') G_t = Σ (W_t − W_a) G_t + (W_a − W_a') Σ G_t`.
        """
        moved = anchor.to(torch.float64)
        spectrum = self.spectrum
        shift = (self.anchor - moved) @ spectrum.eigenvectors
        return Posterior(spectrum, moved, self.projection + shift * spectrum.eigenvalues)

    def condition(self, lam: float) -> float:
        """Return the condition number `(s_max + λ̄)/(s_min + λ̄)` of the matrix that `mean` inverts.

        It is inf where that matrix is singular to the Gram's rounding (some direction keeps the anchor),
        and 1 for `lam = inf`.

        Raises:
            BMMError: `lam` is negative or NaN.
        """
        _require_strength(lam)
        if math.isinf(lam):
            return 1.0
        denominators, seen = self.denominators(lam)
        if not bool(seen.all()):
            return math.inf
        return float(denominators[-1] / denominators[0])

    def denominators(self, lam: float) -> tuple[Tensor, Tensor]:
        """Return `s + λ̄` (in,), float64 ascending, for a finite `λ`, and which of them count as seen, (in,) bool.

        Raises:
            BMMError: `lam` is negative or NaN.
        """
        _require_strength(lam)
        values = self.spectrum.eigenvalues
        denominators = values + lam * self.spectrum.trace / values.numel()
        return denominators, denominators > RELATIVE_CUTOFF * values[-1]


def decompose(gram_sum: Tensor, *, where: str) -> Spectrum:
    """Return the spectrum of a sum of Gram matrices (in, in); a zero matrix is allowed.

    Eigenvalues that rounding pushed below zero become zero.

    Raises:
        BMMError: the matrix is not square, not finite, not symmetric, or not positive semi-definite beyond
            rounding (relative 1e-5); the message names `where`.
    """
    gram = checked_gram(gram_sum, where)
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    if float(values[0]) < -NEGATIVE * float(values[-1].abs()):
        raise BMMError(f"the Gram matrix of {where} has a negative eigenvalue; collect it again")
    return Spectrum(vectors, values.clamp(min=0), float(gram.diagonal().sum()))


def checked_gram(gram_sum: Tensor, where: str) -> Tensor:
    """Return a sum of Gram matrices (in, in) in float64.

    Raises:
        BMMError: it is not square, not finite, or not symmetric beyond rounding; the message names `where`.
    """
    if gram_sum.ndim != 2 or gram_sum.shape[0] != gram_sum.shape[1] or gram_sum.numel() == 0:
        raise BMMError(f"the Gram matrix of {where} has shape {tuple(gram_sum.shape)}, which is not square")
    gram = gram_sum.to(torch.float64)
    if not bool(torch.isfinite(gram).all()):
        raise BMMError(f"the Gram matrix of {where} holds NaN or infinite values; collect it again")
    largest = float(gram.abs().max())
    if float((gram - gram.T).abs().max()) > _ASYMMETRY * largest:
        raise BMMError(f"the Gram matrix of {where} is not symmetric; collect it again")
    return gram


def residual(anchor: Tensor, experts: Iterable[Tensor], grams: Iterable[Tensor]) -> Tensor:
    """Return `Σ_t (W_t − W_a) G_t` (out, in), float64, as `residual_and_energy` does."""
    return residual_and_energy(anchor, experts, grams)[0]


def residual_and_energy(anchor: Tensor, experts: Iterable[Tensor], grams: Iterable[Tensor]) -> tuple[Tensor, float]:
    """Return `Σ_t D_t G_t` (out, in) and `Σ_t tr(D_t G_t D_tᵀ)` with `D_t = W_t − W_a`, float64.

    One expert's weight and Gram are read at a time.

    Raises:
        BMMError: there is not one Gram for each expert, or shapes do not fit.
    """
    pull = Pull(anchor)
    for expert, gram in zip_longest(experts, grams):
        if expert is None or gram is None:
            raise BMMError("the number of experts' weights differs from the number of Gram matrices")
        pull.add(expert, gram)
    return pull.total, pull.energy


class Pull:
    """What draws a map away from its anchor, an expert at a time.

    Args:
        anchor: `W_a` (out, in).

    Attributes:
        anchor: the same, float64.
        total: `Σ_t D_t G_t` (out, in) so far, float64, with `D_t = W_t − W_a`.
        energy: `Σ_t tr(D_t G_t D_tᵀ)` so far.
    """

    def __init__(self, anchor: Tensor) -> None:
        self.anchor = anchor.to(torch.float64)
        self.total = torch.zeros_like(self.anchor)
        self.energy = 0.0

    def add(self, expert: Tensor, gram: Tensor) -> None:
        """Add one expert's weight (out, in) and Gram matrix (in, in).

        Raises:
            BMMError: shapes do not fit.
        """
        anchor = self.anchor
        if expert.shape != anchor.shape or gram.shape != (anchor.shape[1], anchor.shape[1]):
            raise BMMError(
                f"an expert's weight {tuple(expert.shape)} and Gram matrix {tuple(gram.shape)} do not fit "
                f"an anchor of shape {tuple(anchor.shape)}"
            )
        difference = expert.to(torch.float64) - anchor
        product = difference @ gram.to(torch.float64)
        self.total += product
        self.energy += float((product * difference).sum())


def factor(spectrum: Spectrum, anchor: Tensor, residual: Tensor) -> Posterior:
    """Return the posterior for an anchor (out, in) and `residual = Σ_t (W_t − W_a) G_t` (out, in).

    Raises:
        BMMError: shapes do not fit, or the anchor or the residual is not finite.
    """
    inputs = spectrum.eigenvalues.numel()
    if anchor.ndim != 2 or anchor.shape != residual.shape or anchor.shape[1] != inputs:
        raise BMMError(
            f"an anchor of shape {tuple(anchor.shape)} and a residual of shape {tuple(residual.shape)} do "
            f"not fit a Gram matrix of size {inputs}"
        )
    if not bool(torch.isfinite(anchor).all() and torch.isfinite(residual).all()):
        raise BMMError("the anchor or the regression's residual holds NaN or infinite values")
    return Posterior(spectrum, anchor.to(torch.float64), residual.to(torch.float64) @ spectrum.eigenvectors)


def assemble(base: Tensor, mean: Tensor, gamma: float) -> Tensor:
    """Return the weight `W_0 + γ (Ŵ − W_0)` (out, in), float64; `γ = 1` gives the mean bit for bit."""
    if gamma == 1:
        return mean.to(torch.float64, copy=True)
    base = base.to(torch.float64)
    return base + gamma * (mean.to(torch.float64) - base)


def _require_strength(lam: float) -> None:
    if not lam >= 0:
        raise BMMError(f"a prior strength must be zero or positive, not {lam}")
