"""Draws from the posterior of one linear map: how wide it is, and models taken from it.

Likelihood. Task `t` has `rows_t` rows. All have the same noise, of precision `β`, but the regression counts every task
alike, as much as `n` rows: a generalised likelihood, in which the rows of task `t` have the weight `n / rows_t`. An
output row `w` of a map, with `Y_t` its targets (the expert's answers), has

    log p(Y | w) = −β/2 · n · Σ_t ‖ X_t w − Y_t ‖² / rows_t + const,      prior  w ~ N(w_a, (β n λ̄)⁻¹ I)

and with the Gram matrices as they are kept here, means over rows (`G_t = X_tᵀX_t / rows_t`), the posterior is

    N( ŵ, β⁻¹ · 1/n · (Σ_t G_t + λ̄ I)⁻¹ )

The mean needs neither `β` nor `n`, the width needs both. `n` is the harmonic mean of the `rows_t` (`effective_rows`):
it makes `T n` the effective size `(Σ ω)² / Σ ω²` of a sample with these weights (Kish, Survey Sampling, 1965), at most
the number of rows, and gives the mean's sampling variance where tasks have one Gram. A row is what the Gram counted:
one token for most maps of a text encoder. Tokens of one text are not independent, so that the posterior is rather too
narrow.

Noise. `β` is estimated for each output row from the residuals of the mean, as in the evidence framework (MacKay,
Bayesian Interpolation, 1992): `1/β = n e / (T n − γ)` with `e = Σ_t ‖ X_t ŵ − Y_t ‖² / rows_t` and `γ = Σ s/(s + λ̄)`,
the number of directions that the data rather than the prior has settled. So in the end a row's covariance is
`e / (T n − γ) · (Σ_t G_t + λ̄ I)⁻¹`: its width falls with the root of the number of rows, as it should.

Draws. With `Σ_t G_t = U diag(s) Uᵀ` and standard normal `Z` `(out, in)`

    W = Ŵ + β^(−1/2) · Z · U diag( (n (s + λ̄))^(−1/2) ) Uᵀ

The symmetric root, rather than `Z diag(…) Uᵀ`, has the same covariance and does not depend on the signs and rotations
that an eigensolver is free to choose. Output rows, and the maps of a network, are drawn independently of each other.

A direction in which `s = 0` keeps the prior's width. One that counts as never seen (`RELATIVE_CUTOFF`: there `λ̄` is
nothing beside the Gram's rounding) has no proper posterior: as the mean keeps the anchor there, so does every draw.

Which weights, Grams and settings belong together is not decided here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from bmm.digest import digest_text
from bmm.errors import BMMError
from bmm.regression.posterior import Posterior


def effective_rows(rows: Sequence[int]) -> float:
    """Return `n`, the number of rows that each task weighs: the harmonic mean of the tasks' rows.

    Raises:
        BMMError: there is no task, or one has no rows.
    """
    if not rows or min(rows) < 1:
        raise BMMError(f"a posterior's width needs rows for every task, not {list(rows)}")
    return len(rows) / sum(1 / count for count in rows)


def error_from_moments(solution: Tensor, gram: Tensor, cross: Tensor, power: Tensor) -> Tensor:
    """Return `e = Σ_t ‖ X_t Wᵀ − Y_t ‖² / rows_t` of each output row, `(out,)` float64.

    It is `power − 2 diag(W crossᵀ) + diag(W gram Wᵀ)`, which is exact to the rounding of the moments (float32
    products: about 1e-7 of `power`); what rounding pushes below zero becomes zero.

    Args:
        solution: `W` `(out, in)`.
        gram: `Σ_t X_tᵀX_t / rows_t` `(in, in)`.
        cross: `Σ_t Y_tᵀX_t / rows_t` `(out, in)`.
        power: `Σ_t Σ_rows Y_t² / rows_t` `(out,)`.

    Raises:
        BMMError: shapes do not fit.
    """
    outputs, inputs = solution.shape
    if gram.shape != (inputs, inputs) or cross.shape != solution.shape or power.shape != (outputs,):
        raise BMMError(
            f"moments of shapes {tuple(gram.shape)}, {tuple(cross.shape)} and {tuple(power.shape)} do not fit a "
            f"solution of shape {tuple(solution.shape)}"
        )
    weight, gram, cross, power = (part.to(torch.float64) for part in (solution, gram, cross, power))
    return (power + ((weight @ gram - 2 * cross) * weight).sum(dim=1)).clamp(min=0)


def error_from_experts(solution: Tensor, experts: Iterable[Tensor], grams: Iterable[Tensor]) -> Tensor:
    """Return `e` where the targets are the experts' own answers, `diag(Σ_t (W_t − W) G_t (W_t − W)ᵀ)`.

    Args:
        solution: `W` `(out, in)`.
        experts: `W_t` `(out, in)`, read one at a time.
        grams: `G_t` `(in, in)`, as many.

    Returns:
        `(out,)` float64, at least zero.
    """
    mean = solution.to(torch.float64)
    total = torch.zeros(mean.shape[0], dtype=torch.float64)
    for expert, gram in zip(experts, grams, strict=True):
        difference = expert.to(torch.float64) - mean
        total += ((difference @ gram.to(torch.float64)) * difference).sum(dim=1)
    return total.clamp(min=0)


def settled_directions(posterior: Posterior, lam: float) -> float:
    """Return `γ = Σ s/(s + λ̄)`: how many of the `in` directions the data has settled, between 0 and `in`."""
    if math.isinf(lam):
        return 0.0
    denominators, seen = posterior.denominators(lam)
    return float((posterior.spectrum.eigenvalues / torch.where(seen, denominators, torch.inf)).sum())


def noise_variance(posterior: Posterior, lam: float, error: Tensor, rows: float, tasks: int) -> Tensor:
    """Return `1/β` of each output row, `(out,)` float64: `n e / (T n − γ)`.

    With fewer rows than the data has settled directions nothing is left to measure the noise by; the divisor is then
    kept at one.

    Args:
        posterior: of the map.
        lam: the relative prior strength `λ` of the solution that left the error.
        error: `e` `(out,)`.
        rows: `n`, from `effective_rows`.
        tasks: `T`.
    """
    freedom = max(tasks * rows - settled_directions(posterior, lam), 1.0)
    return rows * error.to(torch.float64) / freedom


def deviation(posterior: Posterior, lam: float, variance: Tensor, rows: float, normal: Tensor) -> Tensor:
    """Return what a draw adds to the mean, `(out, in)` float64.

    `λ = ∞`, and inputs that are all zero, leave nothing to draw: the deviation is zero.

    Args:
        posterior: of the map.
        lam: the relative prior strength `λ`.
        variance: `1/β` `(out,)`.
        rows: `n`, from `effective_rows`.
        normal: `Z` `(out, in)`, standard normal.

    Raises:
        BMMError: shapes do not fit, or `lam` is negative or NaN.
    """
    if normal.shape != posterior.anchor.shape or variance.shape != normal.shape[:1]:
        raise BMMError(
            f"a draw of shape {tuple(normal.shape)} with variances {tuple(variance.shape)} does not fit a map of shape "
            f"{tuple(posterior.anchor.shape)}"
        )
    widths = _widths(posterior, lam, rows)
    vectors = posterior.spectrum.eigenvectors
    return variance.sqrt()[:, None] * (((normal.to(torch.float64) @ vectors) * widths) @ vectors.T)


def spread_squared(posterior: Posterior, lam: float, variance: Tensor, rows: float) -> float:
    """Return what `deviation` has as its expected squared Frobenius norm: the trace of the posterior's covariance."""
    return float(variance.sum() * _widths(posterior, lam, rows).square().sum())


def standard_normal(seed: int, index: int, module: str, shape: Sequence[int]) -> Tensor:
    """Return the standard normals, float64, of one module in draw number `index`.

    They depend on these arguments alone, not on what was drawn before; more draws leave the first ones as they are.
    """
    generator = np.random.default_rng([seed, index, int(digest_text(module)[:16], 16)])
    return torch.from_numpy(generator.standard_normal(tuple(shape)))


def _widths(posterior: Posterior, lam: float, rows: float) -> Tensor:
    """Return `(n (s + λ̄))^(−1/2)` `(in,)`, zero in directions that are not drawn."""
    if math.isinf(lam) or posterior.spectrum.trace == 0:
        return torch.zeros_like(posterior.spectrum.eigenvalues)
    denominators, seen = posterior.denominators(lam)
    return torch.where(seen, (rows * denominators).rsqrt(), 0.0)
