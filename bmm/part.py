"""What every part of a recipe has in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Part(BaseModel):
    """Values that never change, with no key but its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")
