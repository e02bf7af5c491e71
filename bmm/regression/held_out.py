"""How strong a prior should be, asked of calibration rows that the solve has not seen; no model is evaluated.

The eigendecomposition makes this a one-dimensional search: every `λ` follows from the rows that were solved on, and
its error on the rows held out follows from their moments.
"""

from __future__ import annotations

from scipy.optimize import minimize_scalar
from torch import Tensor

from bmm.regression.moments import Moments
from bmm.regression.posterior import Spectrum

LOG10_RANGE = (-4.0, 2.0)
_PRECISION = 0.05


def is_held_out(row: int) -> bool:
    """Say whether a calibration row is held out: every fourth, in file order, from the second on."""
    return row % 4 == 1


def best_lambda(fit: Moments, held_out: Moments, spectrum: Spectrum, module: str, anchor: Tensor) -> float:
    """Return the `λ` whose solution on the rows of `fit` errs least on those of `held_out`.

    Args:
        fit: moments of the rows that are solved on.
        held_out: moments of the others, on the same scale.
        spectrum: of `fit`'s Gram.
        module: the map.
        anchor: `[W_a b_a]`, of the cross moment's shape.
    """
    posterior = fit.posterior(spectrum, module, anchor)
    found = minimize_scalar(
        lambda exponent: held_out.error(module, posterior.mean(10.0**exponent)),
        bounds=LOG10_RANGE,
        method="bounded",
        options={"xatol": _PRECISION},
    )
    return float(10.0 ** round(float(found.x), 3))
