"""What a user asks for: one frozen model, read from YAML, with its JSON Schema published.

Only the words live here. Whether the files that a recipe names exist and fit together is checked by
`bmm.sources`; nothing in this module touches a disk beyond the recipe's own file, but for experts that the recipe
leaves to be found (`bmm.discovery`), which have names from here on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator
from pydantic.json_schema import SkipJsonSchema

from bmm.anchors.settings import AnchorSettings, Method, TSVSettings, of_method
from bmm.cluster.settings import ClusterSettings
from bmm.completion import Choices, complete
from bmm.discovery import ExpertSearch, expand
from bmm.errors import RecipeError
from bmm.grams.settings import ActivationGrams, GramSettings
from bmm.kinds.settings import SplitSource, Task, counts_right_rows
from bmm.nightly.settings import Nightly
from bmm.part import SIZE_PATTERN, Part
from bmm.recipe_file import read_mapping
from bmm.regression.settings import RegressionSettings
from bmm.search.settings import Search, SearchSettings

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"


class ExpertSource(Part):
    """One expert: its checkpoint and the task that it was trained for."""

    name: str = Field(pattern=NAME_PATTERN)
    model: str = Field(min_length=1, description="a folder, hub-id@revision, or an MLflow models:/ URI")
    task: Task | None = Field(
        default=None, description="its rows, split by split; without any, nothing is measured or searched"
    )

    def splits(self) -> dict[str, SplitSource]:
        """Return the splits that there are, by name, in a fixed order."""
        return {} if self.task is None else self.task.splits()


def _named(value: Any) -> Any:
    if isinstance(value, list | tuple) and any(isinstance(entry, dict) and "find" in entry for entry in value):
        raise ValueError("experts are found where a recipe is read from a file or a mapping; read it from there")
    return value


Experts = Annotated[
    tuple[ExpertSource, ...],
    BeforeValidator(
        _named,
        json_schema_input_type=Annotated[tuple[ExpertSource, ...], Field(min_length=2)]
        | Annotated[
            tuple[ExpertSource | ExpertSearch, ...], Field(json_schema_extra={"contains": {"required": ["find"]}})
        ],
    ),
]
"""Named one by one; in a recipe's file also left to be found, by which one line may stand for many."""


class EvaluationSettings(Part):
    """How models are measured and against what they are compared."""

    batch_size: int = Field(default=64, ge=1)
    compare: tuple[Method, ...] = Field(
        default=("average", "ta", "ties", "tsv", "wudi", "regmean"),
        description="methods, at their published settings, that get a row in the table",
    )
    compare_at: Literal["published", "validation"] = Field(
        default="published",
        description="where compared methods with a scale stand: at the published one, or at the best on validation",
    )
    bootstrap_samples: int = Field(default=2000, ge=100)
    bootstrap_seed: int = Field(default=0, ge=0)
    confidence: float = Field(default=0.95, gt=0.5, lt=1)

    @field_validator("compare")
    @classmethod
    def _comparable(cls, value: tuple[Method, ...]) -> tuple[Method, ...]:
        if "checkpoint" in value:
            raise ValueError(
                "the method 'checkpoint' has no settings of its own to compare; "
                "make that checkpoint the anchor, or measure it with `bmm eval`"
            )
        return value


class CoverageSettings(Part):
    """When a merge counts as having reached too few of the weights."""

    minimum: float = Field(
        default=0.5, ge=0, le=1, description="least share of the encoder's matrix weights that must be regressed"
    )


class TrackingSettings(Part):
    """What MLflow calls this merge."""

    enabled: bool = True
    experiment: str = Field(default="bayesian-model-merging", min_length=1)


class Recipe(Part):
    """One merge, as a user asks for it. Relative paths are relative to `folder`."""

    base_model: str = Field(min_length=1)
    experts: Experts
    output: str = Field(min_length=1)
    anchor: AnchorSettings = TSVSettings()
    grams: GramSettings = ActivationGrams()
    regression: RegressionSettings = RegressionSettings()
    search: Search = SearchSettings()
    cluster: ClusterSettings = ClusterSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    coverage: CoverageSettings = CoverageSettings()
    tracking: TrackingSettings = TrackingSettings()
    dtype: Literal["base", "float32", "bfloat16", "float16"] = Field(
        default="base", description="dtype of the written weights"
    )
    max_shard_size: str = Field(default="2GiB", pattern=SIZE_PATTERN, description="largest weight file of the output")
    nightly: Nightly | None = Field(
        default=None, exclude=True, description="a merge that is looked after every night: `bmm nightly`, `bmm deploy`"
    )
    folder: SkipJsonSchema[Path] = Field(
        default=Path("."), exclude=True, repr=False, description="set by from_yaml, not by users"
    )

    @field_validator("experts")
    @classmethod
    def _distinct_names(cls, value: tuple[ExpertSource, ...]) -> tuple[ExpertSource, ...]:
        if len(value) < 2:
            raise ValueError(f"a merge needs at least 2 experts, and there {_number(len(value))}; add some")
        names = [expert.name.lower() for expert in value]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"the name '{twice[0]}' is given to two experts; give each its own")
        if "mean" in names:
            raise ValueError("an expert cannot be called 'mean', which is where the means over tasks stand; rename it")
        return value

    @model_validator(mode="after")
    def _completed(self) -> Self:
        names = [expert.name for expert in self.experts]
        if unknown := [name for name in self.regression.task_weights if name not in names]:
            raise ValueError(
                f"'regression.task_weights': no expert is called '{unknown[0]}'; they are {', '.join(names)}"
            )
        said = Choices(self.grams, self.regression, self.search)
        splits = {expert.name: expert.splits() for expert in self.experts}
        choices = complete(
            said,
            splits,
            grams_said="grams" in self.model_fields_set,
            accuracies=all(counts_right_rows(expert.task) for expert in self.experts),
            needs=self._needs(measured=any("test" in own for own in splits.values())),
        )
        for name, part in vars(choices).items():
            object.__setattr__(self, name, part)
        return self

    @property
    def reads_grams(self) -> bool:
        """Whether anything in this merge reads Gram matrices: a walk through the network makes its own."""
        measured = all("test" in expert.splits() for expert in self.experts)
        compared = [of_method(method).needs for method in self.evaluation.compare] if measured else []
        return self.regression.mode == "module-wise" or "gram" in (self.anchor.needs, *compared)

    @property
    def anchor_alone(self) -> bool:
        """Whether the merged model is the anchor, with nothing regressed."""
        return self.regression.mode == "none"

    def _needs(self, *, measured: bool) -> list[tuple[str, str]]:
        """Return the splits that anchor and comparison cannot do without, each with the key and what it asks for."""
        needs: list[tuple[str, str]] = []
        if self.regression.mode == "none":
            if self.anchor.needs not in (None, "checkpoint") or self.anchor.chooses_scale:
                raise ValueError(
                    "'anchor': without regression (mode: none) nothing but weights is read, and this anchor needs "
                    "rows; choose another method or a scale that is a number, or set another regression.mode"
                )
            if self.regression.fits_heads is not None:
                raise ValueError(
                    "'regression.heads': without regression (mode: none) no row is read, and a head is fitted on rows; "
                    "leave it out, or set another regression.mode"
                )
            return needs
        if self.regression.fits_heads is not None and self.regression.heads is not None:
            needs.append(("calibration", "'regression.heads'"))
        if self.anchor.needs == "fisher":
            needs.append(("calibration", "'anchor': the method 'fisher'"))
        if self.anchor.chooses_scale:
            needs.append(("validation", "'anchor.scale': a scale that is chosen on validation rows"))
        if measured and "fisher" in self.evaluation.compare:
            needs.append(("calibration", "'evaluation.compare': the method 'fisher'"))
        if measured and self.evaluation.compare_at == "validation":
            needs.append(("validation", "'evaluation.compare_at': a scale that is chosen on validation rows"))
        return needs

    @classmethod
    def from_yaml(cls, path: str | Path) -> Recipe:
        """Read a recipe from a YAML file.

        Raises:
            RecipeError: the file is missing, is not YAML, or says something a recipe cannot say.
        """
        path = Path(path)
        return cls.from_mapping(read_mapping(path), folder=path.resolve().parent, where=str(path))

    @classmethod
    def from_mapping(cls, value: dict[str, Any], *, folder: str | Path = ".", where: str = "the recipe") -> Recipe:
        """Build a recipe from plain values, with relative paths taken from `folder`.

        Raises:
            RecipeError: a key is unknown, missing or has an impossible value.
        """
        if "folder" in value:
            raise RecipeError(f"{where}: 'folder' is not a key of the recipe; remove it")
        for part, tag in (("anchor", {"method": "tsv"}), ("grams", {"source": "activations"})):
            if isinstance(value.get(part), dict):
                value = {**value, part: {**tag, **value[part]}}
        try:
            folder = Path(folder).resolve()
            return cls.model_validate({**expand(value, folder), "folder": folder})
        except ValidationError as error:
            raise RecipeError(f"{where}: {explain(error)}") from None

    def resolve(self, path: str) -> Path:
        """Return `path` as an absolute path, taken from the recipe's folder where it is relative."""
        return (self.folder / Path(path).expanduser()).resolve()

    def document(self) -> dict[str, Any]:
        """Return the recipe as plain JSON values, defaults filled in, without the folder it was read from."""
        return self.model_dump(mode="json")


def _number(count: int) -> str:
    return "is one" if count == 1 else "are none"


def explain(error: ValidationError, *above: str) -> str:
    """Return the first mistake as one sentence that names its key, which stands below the keys `above`."""
    first = error.errors()[0]
    if error.title == ExpertSearch.__name__:
        above = ("experts", "find")
    parts = [*above, *(str(part) for part in first["loc"])]
    if parts[:1] in (["anchor"], ["grams"]):
        # Discriminated unions put the chosen kind between the key and its option; users never wrote it as a key.
        del parts[1:2]
    if parts[:1] == ["experts"] and parts[2:3] == ["task"]:
        # And the kind between a task and its keys.
        del parts[3:4]
    key = ".".join(parts) or "the recipe"
    match first["type"]:
        case "extra_forbidden":
            return f"unknown key '{key}'; remove it or correct its spelling"
        case "missing":
            return f"the key '{key}' is missing; add it"
        case "union_tag_invalid":
            word, expected = (first["ctx"][name].replace("'", "") for name in ("discriminator", "expected_tags"))
            return f"'{key}.{word}': there is no {word} '{first['ctx']['tag']}'; choose one of {expected}"
        case _:
            message = first["msg"].removeprefix("Value error, ")
            if not parts:
                # Keys that do not fit together: the sentence names them itself.
                return str(message)
            given = first.get("input")
            shown = f" (given: {given!r})" if isinstance(given, str | int | float | bool) else ""
            return f"'{key}': {message}{shown}"
