"""What a recipe may say about the Dask cluster that computes. No torch and no Dask here."""

from __future__ import annotations

from pydantic import Field

from bmm.part import SIZE_PATTERN, Part


class ClusterSettings(Part):
    """The Dask cluster that computes Gram matrices: an address, or local worker processes."""

    scheduler: str | None = Field(default=None, description="tcp://host:port of a running scheduler")
    workers: int = Field(default=2, ge=1)
    memory_limit: str = Field(default="8GiB", pattern=SIZE_PATTERN)
