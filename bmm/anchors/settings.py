"""What a recipe may say about its anchor, one frozen model a method. No mathematics and no torch here."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import PydanticCustomError

Method = Literal[
    "average", "ta", "ties", "dare", "tsv", "iso-c", "iso-cts", "wudi", "regmean", "fisher", "ace", "checkpoint"
]
"""Every method by name."""
Need = Literal["checkpoint", "gram", "fisher"]
"""What a method may need besides weights, by the name that it has in `bmm.anchors.interface.Sources`."""


def _one_sentence(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    try:
        return handler(value)
    except ValidationError:
        raise PydanticCustomError("scale", "must be a number above 0 and at most 2, or 'validation'") from None


Number = Annotated[float, Field(gt=0, le=2)]
Scale = Annotated[Number | Literal["validation"], WrapValidator(_one_sentence)]
"""What a direction is multiplied by: given, or the best of `scales` on the validation rows."""
OptionalScale = Annotated[Number | Literal["validation"] | None, WrapValidator(_one_sentence)]
Scales = Annotated[
    tuple[Number, ...],
    Field(min_length=1, description="tried on the validation rows with scale: validation; the first of the best wins"),
]
_SCALES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.2, 1.5)


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    needs: ClassVar[Need | None] = None
    ordered: ClassVar[bool] = False
    """Whether the experts' places in the recipe count."""

    @property
    def chooses_scale(self) -> bool:
        """Whether the scale is to be chosen on the validation rows."""
        return False

    def said(self) -> dict[str, Any]:
        """Return what decides the result, as JSON: not where a checkpoint lies, nor scales that are not tried."""
        unused = {"path"} if self.chooses_scale else {"path", "scales"}
        return self.model_dump(mode="json", exclude=unused)


class ScaledSettings(_Settings):
    """What the methods share whose result is `W_0 + scale · direction`."""

    scale: OptionalScale = None
    scales: Scales = _SCALES

    @property
    def chooses_scale(self) -> bool:
        """Whether the scale is to be chosen on the validation rows."""
        return self.scale == "validation"

    def at(self, scale: float | Literal["validation"]) -> Self:
        """Return the same settings with another scale."""
        return self.model_copy(update={"scale": scale})


class AverageSettings(_Settings):
    """The plain mean of the experts' weights (model soup)."""

    method: Literal["average"] = "average"


class TaskArithmeticSettings(ScaledSettings):
    """`W_0 + scale · Σ τ_t` (Ilharco et al., arXiv 2212.04089)."""

    method: Literal["ta"] = "ta"
    scale: Scale = Field(default=0.3, description="a number, or validation: the best of scales")


class TIESSettings(ScaledSettings):
    """Trim, elect sign, merge (Yadav et al., arXiv 2306.01708)."""

    method: Literal["ties"] = "ties"
    density: float = Field(default=0.2, gt=0, le=1, description="share of entries kept, by magnitude")
    scope: Literal["global", "tensor"] = Field(
        default="global", description="keep the largest of the whole task vector, or of each tensor"
    )
    combine: Literal["mean", "sum"] = "mean"
    scale: OptionalScale = Field(
        default=None,
        description="a number, or validation: the best of scales; defaults to 1 for the mean and 0.3 for the sum",
    )


class DARESettings(ScaledSettings):
    """Drop entries of the task vectors at random, rescale the rest, then merge (Yu et al., arXiv 2311.03099)."""

    ordered: ClassVar[bool] = True

    method: Literal["dare"] = "dare"
    drop: float = Field(default=0.9, ge=0, lt=1, description="probability with which an entry is dropped")
    then: Literal["ta", "ties"] = Field(default="ta", description="how the thinned task vectors are merged")
    density: float = Field(
        default=0.2, gt=0, le=1, description="of TIES afterwards: share of all entries kept, by magnitude"
    )
    scale: OptionalScale = Field(
        default=None, description="a number, or validation: the best of scales; defaults to 0.3 for ta and 1 for ties"
    )
    seed: int = Field(default=0, ge=0, description="of the random masks")


class TSVSettings(ScaledSettings):
    """Task singular vectors, TSV-M (Gargiulo et al., arXiv 2412.00081)."""

    method: Literal["tsv"] = "tsv"
    scale: Scale = Field(default=1.0, description="a number, or validation: the best of scales")


class IsoCSettings(ScaledSettings):
    """Isotropic merging in the common subspace, Iso-C (Marczak et al., arXiv 2502.04959)."""

    method: Literal["iso-c"] = "iso-c"
    scale: Scale = Field(default=1.0, description="a number, or validation: the best of scales")


class IsoCTSSettings(ScaledSettings):
    """Isotropic merging in common and task-specific subspaces, Iso-CTS (Marczak et al., arXiv 2502.04959)."""

    method: Literal["iso-cts"] = "iso-cts"
    common: float = Field(default=0.8, ge=0, le=1, description="share of the directions that all tasks have in common")
    scale: Scale = Field(default=1.0, description="a number, or validation: the best of scales")


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

    def said(self) -> dict[str, Any]:
        """Return what decides the result, as JSON: of the solver's settings only its own."""
        others = {"steps", "learning_rate"} if self.solver == "exact" else {"cutoff"}
        return {name: value for name, value in super().said().items() if name not in others}


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
    seed: int = Field(default=0, ge=0, lt=2**63, description="of the sampled labels")


class ACESettings(ScaledSettings):
    """ACE-Merging, covariances estimated from task vectors (Xu et al., arXiv 2603.02945)."""

    method: Literal["ace"] = "ace"
    ridge: float = Field(default=1e-2, gt=0, description="added to the diagonal of each estimated covariance")
    threshold: float = Field(
        default=0.3, ge=0, description="heterogeneity above which tasks are normalised and the spectrum corrected"
    )
    spectrum: float = Field(default=0.3, gt=0, le=1, description="share of the directions in the spectral correction")
    scale: Scale = Field(default=1.0, description="a number, or validation: the best of scales")


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


def of_method(method: str) -> AnchorSettings:
    """Return a method's settings as its authors published them, which are the defaults."""
    published: AnchorSettings = TypeAdapter(AnchorSettings).validate_python({"method": method})
    return published
