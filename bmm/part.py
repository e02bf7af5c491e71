"""What every part of a recipe has in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

SIZE_PATTERN = r"^\d+(\.\d+)?\s*([kKMGT]i?)?B$"
"""What is said where a size is meant."""


class Part(BaseModel):
    """Values that never change, with no key but its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")
