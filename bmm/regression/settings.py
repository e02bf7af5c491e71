"""What a recipe may say about the regression. No mathematics and no torch here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator

Rule = Literal["search", "evidence", "held-out"]
"""Ways to find a prior strength: on the validation rows; by the marginal likelihood, without rows; in propagated mode,
by the error on calibration rows held out of the solve, without an evaluation."""

Strength = Annotated[float, Field(gt=0, allow_inf_nan=False)]

DEFAULT_LAMBDA = 0.1


class RegressionSettings(BaseModel):
    """How the module weights are solved for."""

    model_config = ConfigDict(frozen=True, extra="forbid", serialize_by_alias=True)

    mode: Literal["module-wise", "propagated", "none"] = Field(
        default="propagated",
        description="each map on what its experts read (always, and by default, where grams.source is not "
        "activations), or, layer by layer, on what the merged model itself reads; none: the anchor alone, merged "
        "tensor by tensor straight into the output, from the weights only and without measuring anything",
    )
    # Named by the recipe's own word, which is Python's as well.
    strength: Rule | Strength | dict[str, Strength] = Field(
        default="search",
        alias="lambda",
        description="the prior's strength: search (on the validation rows), evidence (the most probable for each "
        "group, without rows), held-out (for each map the one that errs least on a quarter of the calibration rows, "
        "held out of the solve), a number, or a number for each group of search.per; without a search, a number",
    )
    walk_lambda: Annotated[float, Field(gt=0, allow_inf_nan=False)] | Literal["held-out"] = Field(
        default=DEFAULT_LAMBDA,
        description="of the walk through the network in propagated mode, before the search: one for every map, or "
        "held-out, for each map its own (see lambda); lambda where that is not searched",
    )

    rounds: int = Field(
        default=1,
        ge=1,
        le=8,
        description="walks through the network in propagated mode, each from the model that the one before has solved",
    )
    task_weights: dict[str, Strength] = Field(
        default_factory=dict,
        description="how much an expert counts in the sum over tasks; 1 for those that are not named",
    )

    @field_validator("strength", mode="before")
    @classmethod
    def _a_rule_or_numbers(cls, value: Any) -> Any:
        """Say in one sentence what pydantic would say once for each alternative."""
        numbers = list(value.values()) if isinstance(value, dict) else [value]
        if not (isinstance(value, str) and value in get_args(Rule)) and not (
            numbers and all(_is_strength(number) for number in numbers)
        ):
            raise ValueError(
                f"must be {', '.join(get_args(Rule))}, a positive number, or a positive number for each module group"
            )
        return value

    heads: Strength | Literal["keep"] | None = Field(
        default=None,
        description="fit the last layer of each expert's own head to the merged model, with this prior strength "
        "towards the expert's: to what the expert answers on its calibration rows, without labels; keep: the experts' "
        f"heads as they are (always where a head has no such layer); {DEFAULT_LAMBDA} where every expert has "
        "calibration rows and Gram matrices are not from task vectors, else keep",
    )

    def settings(self) -> dict[str, Any]:
        """Return what results depend on, as JSON."""
        if self.mode == "none":
            return {"mode": self.mode}
        walk = set() if self.mode == "propagated" else {"walk_lambda", "rounds"}
        said = self.model_dump(mode="json", exclude={*walk, "heads"})
        return said if self.fits_heads is None else {**said, "heads": self.fits_heads}

    @property
    def fits_heads(self) -> float | None:
        """The prior strength with which heads are fitted; None where they are kept.

        Module-wise, what a recipe leaves open depends on its rows and Gram matrices: `bmm.completion` says it.
        """
        if self.heads is None:
            return DEFAULT_LAMBDA if self.mode == "propagated" else None
        return None if self.heads == "keep" else self.heads

    def weights(self, experts: Sequence[str]) -> list[float]:
        """Return how much each expert counts."""
        return [self.task_weights.get(name, 1.0) for name in experts]


def _is_strength(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")
