"""What a recipe may say about where its Gram matrices come from, one frozen model a source. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

SAMPLE = ("tokens", "tokens_seed")
"""What says how much of each sequence is kept. Said by none who keep it all: their keys are older than the option."""


def sample_in(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what settings say of a sample of each sequence's tokens: nothing where all are kept."""
    return {name: settings[name] for name in SAMPLE if settings.get("tokens") is not None}


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Shards(_Settings):
    shard_rows: int = Field(default=128, ge=1, description="calibration rows in one shard of work")
    batch_size: int = Field(default=32, ge=1, description="rows in one forward pass")
    tokens: int | None = Field(
        default=None,
        ge=1,
        description="tokens of each sequence (patches of an image, frames of a sound) that are kept at most, drawn at "
        "random among those that are not padding; all by default. A walk of propagated regression keeps as many",
    )
    tokens_seed: int = Field(default=0, ge=0, description="seed of the draw of tokens")

    @model_serializer(mode="wrap")
    def _said(self, said: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = said(self)
        return values if self.tokens is not None else {name: values[name] for name in values if name not in SAMPLE}


class ActivationGrams(_Shards):
    """What each linear map is fed when its expert reads its own calibration rows."""

    source: Literal["activations"] = "activations"


class TaskVectorGrams(_Settings):
    """Estimated from the task vectors, without any data."""

    source: Literal["task-vectors"] = "task-vectors"


class HybridGrams(_Shards):
    """Both, for few calibration rows: `ρ G/tr(G) + (1 − ρ) Ĝ/tr(Ĝ)`."""

    source: Literal["hybrid"] = "hybrid"
    rho: float = Field(default=0.5, ge=0, le=1, description="share of the activations; the rest is the task vectors'")


class ArtifactGrams(_Settings):
    """Made elsewhere, and published by `bmm grams RECIPE --output DIR`."""

    source: Literal["artifact"] = "artifact"
    path: str | dict[str, str] = Field(
        description="the folder that `bmm grams --output` wrote, or a folder for each expert by the expert's name"
    )

    def folders(self, experts: tuple[str, ...]) -> dict[str, str]:
        """Return each expert's folder as the recipe says it; the experts are in their own order.

        Raises:
            ValueError: an expert has no folder, or a folder no expert.
        """
        if isinstance(self.path, str):
            return {expert: f"{self.path.rstrip('/')}/{expert}" for expert in experts}
        odd = sorted(set(self.path) ^ set(experts))
        if odd:
            said = "is no expert of this recipe; remove it" if odd[0] in self.path else "has no folder; name its folder"
            raise ValueError(f"'grams.path': {odd[0]} {said}")
        return {expert: self.path[expert] for expert in experts}


GramSettings = Annotated[ActivationGrams | TaskVectorGrams | HybridGrams | ArtifactGrams, Field(discriminator="source")]
