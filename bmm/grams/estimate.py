"""Gram matrices without data, or with little: estimated from task vectors, and blended with those of activations.

A step of gradient descent on a linear map is `τ = −η Σ δ xᵀ`, so the rows of a task vector lie in the span of the
inputs that it was trained on, and

    Ĝ_t = τ_tᵀ τ_t / ‖τ_t‖²_F        τ_t (out, in), trace 1

stands in for the expert's Gram matrix up to scale. WUDI-Merging's objective (Cheng et al., arXiv 2503.08099)
`Σ ‖(M − τ_t) τ_tᵀ‖²/‖τ_t‖²` has the minimiser `(Σ τ_t Ĝ_t)(Σ Ĝ_t)⁺`: it is the regression on these matrices, without
a prior. Where weights are read and matrices kept is not known here.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from bmm.errors import BMMError
from bmm.grams.collect import GramSum


def from_task_vectors(vectors: Iterable[Tensor]) -> GramSum:
    """Return the estimate for one input, from the task vectors `(out_m, in)` of the maps that read it; float64.

    The maps are stacked, `τ = [τ_1; τ_2; …]`: query, key and value that read one input are one map with their
    outputs side by side, and a model that stores them as one matrix must get the same estimate. So a map that moved
    further counts for more.

    The sum holds `rows · Ĝ` with as many rows as `τ` has outputs, so that divided by its rows it is `Ĝ` (trace 1), as
    if `τ`, scaled, were the inputs. It is zero where the expert equals the base.

    Raises:
        BMMError: there are no maps, they differ in their inputs, or a task vector is not finite.
    """
    total: Tensor | None = None
    energy, rows = 0.0, 0
    for vector in vectors:
        if vector.ndim != 2 or (total is not None and total.shape[0] != vector.shape[1]):
            raise BMMError(f"a task vector of shape {tuple(vector.shape)} does not read the input of the others")
        vector = vector.to(torch.float64)
        energy += float(vector.square().sum())
        rows += vector.shape[0]
        product = vector.T @ vector
        total = product if total is None else total.add_(product)
    if total is None:
        raise BMMError("a Gram matrix was asked for of no task vectors")
    if not bool(torch.isfinite(total).all()):
        raise BMMError("a task vector is not finite")
    return GramSum(total * (rows / energy) if energy > 0 else torch.zeros_like(total), rows)


def blend(activations: GramSum, vectors: GramSum, rho: float) -> GramSum:
    """Return `tr(G) · [ρ G/tr(G) + (1 − ρ) Ĝ/tr(Ĝ)]` as a sum over the rows of `G`, float64.

    It keeps the trace of the activations' Gram, so experts weigh against each other as they do with activations.
    Where the task vectors say nothing (the expert equals the base there), the activations stand alone.

    Raises:
        BMMError: the sizes differ, or `rho` is not between 0 and 1.
    """
    if not 0 <= rho <= 1:
        raise BMMError(f"the share of the activations must be between 0 and 1, not {rho}")
    if activations.total.shape != vectors.total.shape:
        raise BMMError(
            f"a Gram matrix of activations {tuple(activations.total.shape)} and one of task vectors "
            f"{tuple(vectors.total.shape)} do not fit"
        )
    own, other = (float(part.total.diagonal().sum()) for part in (activations, vectors))
    if other == 0:
        return GramSum(activations.total.clone(), activations.rows)
    return GramSum(rho * activations.total + (1 - rho) * (own / other) * vectors.total, activations.rows)
