"""A task's own last layer, fitted to what its expert answers, from what the merged model feeds to it.

The last step of propagated regression, and the only one that no task shares: the head of task `t` is the posterior mean

    argmin_W  ‖ X̃ [W b]ᵀ − Y ‖² / rows  +  λ̄ ‖ [W b] − [W_t b_t] ‖²,    λ̄ = λ · tr(X̃ᵀX̃ / rows) / features

with `X̃` the merged model's features of the calibration rows, `Y` the expert's own answers to them, no labels, and the
expert's own head as prior. From fewer than 256 rows the prior counts for more, `λ · 256 / rows`: measured on four text
tasks, 16 rows at a `λ` that is good for 256 lose what 256 gain. The source is this project's measurements. Which layer
that is, and where rows come from, is the callers'; the mathematics is `bmm.regression.posterior`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bmm.errors import BMMError
from bmm.modules.linear import LinearMap
from bmm.regression.moments import TaskSums

FULL_ROWS = 256
"""From so many rows on, the prior's strength is as it was asked for."""


def fitted_head(inputs: Tensor, answers: Tensor, weight: Tensor, bias: Tensor | None, lam: float) -> Tensor:
    """Return `[W b]`, `(classes, features + 1)`, or `W` where there is no bias, float32.

    Args:
        inputs: `(rows, features)`, the merged model's.
        answers: `(rows, classes)`, the expert's to the same rows.
        weight: `(classes, features)`, the expert's head.
        bias: `(classes,)`, or None.
        lam: `λ` for 256 rows and more; towards infinity the expert's head stays.

    Raises:
        BMMError: rows and answers do not pair up, or one is not finite.
    """
    if len(inputs) != len(answers):
        raise BMMError(f"{len(inputs)} rows of a head's inputs were given with {len(answers)} answers")
    classes, features = weight.shape
    map_ = LinearMap("head", classes, features, "head", "other", None, "weight", None if bias is None else "bias")
    sums = TaskSums([map_])
    sums.add(inputs, {"head": answers})
    moments = sums.moments()
    prior = map_.matrix({"weight": weight, "bias": bias}.__getitem__)  # type: ignore[arg-type]
    posterior = moments.posterior(moments.spectrum("the input of a head"), "head", prior)
    return posterior.mean(lam * max(1.0, FULL_ROWS / len(inputs))).to(torch.float32)
