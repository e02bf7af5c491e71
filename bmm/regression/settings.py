"""What a recipe may say about the regression. No mathematics and no torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class RegressionSettings(BaseModel):
    """How the module weights are solved for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Literal["module-wise", "propagated"] = Field(
        default="propagated",
        description="each map on what its experts read (always, and by default, where grams.source is not "
        "activations), or, layer by layer, on what the merged model itself reads",
    )
    walk_lambda: float = Field(
        default=0.1,
        gt=0,
        description="of the walk through the network in propagated mode, before the search",
    )
