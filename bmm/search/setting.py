"""The hyperparameters of one module group, as numbers; where they are looked for is `bmm.search.space`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bmm.errors import BMMError


@dataclass(frozen=True)
class Setting:
    """What decides the weights of a module group.

    Attributes:
        lam: relative prior strength `λ`; `math.inf` is the anchor, 0 is RegMean.
        gamma: assembly scale `γ`.
        anchor_scale: what the anchor's distance from the base is multiplied by, as a prior.
        rho: share of the activations in hybrid Gram matrices; None leaves them as they are.
        weights: how much each expert counts in the sum over tasks, in the order of names; none leaves them as they are.

    Raises:
        BMMError: `lam` is negative or NaN, or another value is not finite.
    """

    lam: float
    gamma: float
    anchor_scale: float = 1.0
    rho: float | None = None
    weights: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        # As the log keeps them: equal settings are equal after they were read back.
        object.__setattr__(self, "weights", tuple(sorted(self.weights)))
        if not self.lam >= 0 or not math.isfinite(self.gamma):
            raise BMMError(f"a setting needs λ >= 0 and a finite γ, not λ = {self.lam} and γ = {self.gamma}")
        if not all(
            math.isfinite(value) for value in (self.anchor_scale, self.rho or 0.0, *dict(self.weights).values())
        ):
            raise BMMError(f"a setting needs finite values, not {self}")

    @property
    def sums(self) -> tuple[float | None, tuple[tuple[str, float], ...]]:
        """What the sum of Gram matrices depends on."""
        return self.rho, self.weights

    def to_json(self) -> dict[str, Any]:
        """Return the setting as JSON values; an infinite λ becomes null, and what is as it always is is left out."""
        said: dict[str, Any] = {"lambda": None if math.isinf(self.lam) else float(self.lam), "gamma": float(self.gamma)}
        if self.anchor_scale != 1.0:
            said["anchor_scale"] = float(self.anchor_scale)
        if self.rho is not None:
            said["rho"] = float(self.rho)
        if self.weights:
            said["task_weights"] = {name: float(value) for name, value in self.weights}
        return said

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Setting:
        """Return the setting that `to_json` wrote."""
        lam = value["lambda"]
        return cls(
            math.inf if lam is None else float(lam),
            float(value["gamma"]),
            float(value.get("anchor_scale", 1.0)),
            value.get("rho"),
            tuple(value.get("task_weights", {}).items()),
        )


ANCHOR = Setting(math.inf, 1.0)
"""Where a group keeps its anchor, bit for bit."""
