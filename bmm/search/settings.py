"""What a recipe may say about the search. No mathematics and no torch here."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

Per = Literal["model", "type", "depth", "type x depth", "module"]
"""What shares one pair of hyperparameters."""
Range = Annotated[tuple[float, float], Field(description="lower and upper end")]
# Beyond these the arithmetic still works but nothing that a model could want is left to find.
LARGEST_LOG10_LAMBDA = 30.0
LARGEST_GAMMA = 1000.0


class SearchSettings(BaseModel):
    """The outer loop: which hyperparameters vary together, how many trials, towards what."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    per: Per = "type"
    trials: int = Field(default=24, ge=0, description="0, and by default without validation rows: no search")
    objective: Literal["share-of-expert"] = "share-of-expert"
    seed: int = Field(default=0, ge=0)
    log10_lambda: Range = (-4.0, 2.0)
    # Wider, the search chases the noise of a few hundred validation rows. Measured on the demo's four tasks (experts of
    # 160 steps, 800 rows, 24 trials): [0.5, 1.5] ended at 100.3 % of the experts on validation and 95.7 % on test;
    # λ = 0.1 and γ = 1 have 98.1 % and 97.4 %.
    gamma: Range = (0.9, 1.1)

    @field_validator("log10_lambda", "gamma")
    @classmethod
    def _ordered(cls, value: tuple[float, float], info: ValidationInfo) -> tuple[float, float]:
        if not value[0] < value[1]:
            raise ValueError("the lower end must be below the upper end")
        largest = LARGEST_LOG10_LAMBDA if info.field_name == "log10_lambda" else LARGEST_GAMMA
        if not -largest <= value[0] < value[1] <= largest:
            raise ValueError(f"both ends must lie within ±{largest:g}")
        return value

    @model_validator(mode="after")
    def _anchor_within(self) -> Self:
        if not self.gamma[0] <= 1.0 <= self.gamma[1]:
            raise ValueError("gamma must include 1, where the anchor stands")
        return self


def _none(value: Any) -> Any:
    return {"trials": 0} if value in (None, "none") else value


Search = Annotated[
    SearchSettings, BeforeValidator(_none, json_schema_input_type=SearchSettings | Literal["none"] | None)
]
"""The settings, or `none`, which says that there is no search."""
