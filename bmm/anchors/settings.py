"""What a recipe may say about its anchor, one frozen model a method. No mathematics and no torch here."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

Method = Literal[
    "average", "ta", "ties", "dare", "tsv", "iso-c", "iso-cts", "wudi", "regmean", "fisher", "ace", "checkpoint"
]
"""Every method by name."""
Need = Literal["checkpoint", "gram", "fisher"]
"""What a method may need besides weights, by the name that it has in `bmm.anchors.interface.Sources`."""


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    needs: ClassVar[Need | None] = None


class AverageSettings(_Settings):
    """The plain mean of the experts' weights (model soup)."""

    method: Literal["average"] = "average"


class TaskArithmeticSettings(_Settings):
    """`W_0 + scale · Σ τ_t` (Ilharco et al., arXiv 2212.04089)."""

    method: Literal["ta"] = "ta"
    scale: float = Field(default=0.3, gt=0, le=2)


class TIESSettings(_Settings):
    """Trim, elect sign, merge (Yadav et al., arXiv 2306.01708)."""

    method: Literal["ties"] = "ties"
    density: float = Field(default=0.2, gt=0, le=1, description="share of entries kept, by magnitude")
    scope: Literal["global", "tensor"] = Field(
        default="global", description="keep the largest of the whole task vector, or of each tensor"
    )
    combine: Literal["mean", "sum"] = "mean"
    scale: float | None = Field(default=None, gt=0, le=2, description="defaults to 1 for the mean and 0.3 for the sum")


class DARESettings(_Settings):
    """Drop entries of the task vectors at random, rescale the rest, then merge (Yu et al., arXiv 2311.03099)."""

    method: Literal["dare"] = "dare"
    drop: float = Field(default=0.9, ge=0, lt=1, description="probability with which an entry is dropped")
    then: Literal["ta", "ties"] = Field(default="ta", description="how the thinned task vectors are merged")
    density: float = Field(
        default=0.2, gt=0, le=1, description="of TIES afterwards: share of all entries kept, by magnitude"
    )
    scale: float | None = Field(default=None, gt=0, le=2, description="defaults to 0.3 for ta and 1 for ties")
    seed: int = Field(default=0, ge=0, description="of the random masks")


class TSVSettings(_Settings):
    """Task singular vectors, TSV-M (Gargiulo et al., arXiv 2412.00081)."""

    method: Literal["tsv"] = "tsv"
    scale: float = Field(default=1.0, gt=0, le=2)


class IsoCSettings(_Settings):
    """Isotropic merging in the common subspace, Iso-C (Marczak et al., arXiv 2502.04959)."""

    method: Literal["iso-c"] = "iso-c"
    scale: float = Field(default=1.0, gt=0, le=2)


class IsoCTSSettings(_Settings):
    """Isotropic merging in common and task-specific subspaces, Iso-CTS (Marczak et al., arXiv 2502.04959)."""

    method: Literal["iso-cts"] = "iso-cts"
    common: float = Field(default=0.8, ge=0, le=1, description="share of the directions that all tasks have in common")
    scale: float = Field(default=1.0, gt=0, le=2)


class WUDISettings(_Settings):
    """WUDI-Merging (Cheng et al., arXiv 2503.08099)."""

    method: Literal["wudi"] = "wudi"
    solver: Literal["exact", "adam"] = Field(
        default="exact", description="the objective's exact minimiser, or the published Adam schedule"
    )
    cutoff: float = Field(
        default=1e-3, gt=0, lt=1, description="of the exact solver: eigenvalues of Σ Ĝ_t below this share are left out"
    )
    steps: int = Field(default=300, ge=1, description="Adam steps; the exact solver has none")
    learning_rate: float = Field(default=1e-5, gt=0, description="of the Adam schedule")


class RegMeanSettings(_Settings):
    """RegMean, the regression without a prior (Jin et al., arXiv 2212.09849)."""

    needs: ClassVar[Need | None] = "gram"

    method: Literal["regmean"] = "regmean"
    off_diagonal: float = Field(
        default=0.9, ge=0, le=1, description="share of the Gram matrices' off-diagonal entries that is kept"
    )


class FisherSettings(_Settings):
    """Fisher-weighted averaging (Matena & Raffel, arXiv 2111.09832)."""

    needs: ClassVar[Need | None] = "fisher"

    method: Literal["fisher"] = "fisher"
    labels: Literal["sampled", "expected", "data"] = Field(
        default="sampled",
        description="whose gradients are squared: one class drawn from the expert's own answer a row, "
        "every class weighted by its probability (as many times slower as there are classes), or the row's own label",
    )
    normalize: bool = Field(default=True, description="bring every expert's Fisher information to one norm")
    floor: float = Field(default=1e-6, gt=0, description="added to every entry, for those that no row reaches")
    seed: int = Field(default=0, ge=0, description="of the sampled labels")


class ACESettings(_Settings):
    """ACE-Merging, covariances estimated from task vectors (Xu et al., arXiv 2603.02945)."""

    method: Literal["ace"] = "ace"
    ridge: float = Field(default=1e-2, gt=0, description="added to the diagonal of each estimated covariance")
    threshold: float = Field(
        default=0.3, ge=0, description="heterogeneity above which tasks are normalised and the spectrum corrected"
    )
    spectrum: float = Field(default=0.3, gt=0, le=1, description="share of the directions in the spectral correction")
    scale: float = Field(default=1.0, gt=0, le=2)


class CheckpointAnchorSettings(_Settings):
    """Any checkpoint of the same architecture as the anchor."""

    needs: ClassVar[Need | None] = "checkpoint"

    method: Literal["checkpoint"] = "checkpoint"
    path: str = Field(description="a folder, hub-id@revision, or an MLflow models:/ URI")


AnchorSettings = Annotated[
    AverageSettings
    | TaskArithmeticSettings
    | TIESSettings
    | DARESettings
    | TSVSettings
    | IsoCSettings
    | IsoCTSSettings
    | WUDISettings
    | RegMeanSettings
    | FisherSettings
    | ACESettings
    | CheckpointAnchorSettings,
    Field(discriminator="method"),
]
