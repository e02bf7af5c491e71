"""What a user asks for: one frozen model, read from YAML, with its JSON Schema published.

Only the words live here. Whether the files that a recipe names exist and fit together is checked by
`bmm.sources`; nothing in this module touches a disk beyond the recipe's own file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic.json_schema import SkipJsonSchema

from bmm.anchors.settings import AnchorSettings, Method, TSVSettings
from bmm.errors import RecipeError
from bmm.grams.settings import ActivationGrams, ArtifactGrams, GramSettings
from bmm.kinds.settings import Task
from bmm.part import Part
from bmm.regression.settings import RegressionSettings

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
SIZE_PATTERN = r"^\d+(\.\d+)?\s*([kKMGT]i?)?B$"


class ExpertSource(Part):
    """One expert: its checkpoint and the task that it was trained for."""

    name: str = Field(pattern=NAME_PATTERN)
    model: str = Field(min_length=1, description="a folder, hub-id@revision, or an MLflow models:/ URI")
    task: Task


Range = Annotated[tuple[float, float], Field(description="lower and upper end")]


class SearchSettings(Part):
    """The outer loop: which hyperparameters vary together, how many trials, towards what."""

    per: Literal["model", "type", "depth", "type x depth", "module"] = "type"
    trials: int = Field(default=24, ge=1)
    objective: Literal["share-of-expert"] = "share-of-expert"
    seed: int = Field(default=0, ge=0)
    log10_lambda: Range = (-4.0, 2.0)
    # Wider, the search chases the noise of a few hundred validation rows. Measured on the demo's four tasks (experts of
    # 160 steps, 800 rows, 24 trials): [0.5, 1.5] ended at 100.3 % of the experts on validation and 95.7 % on test;
    # λ = 0.1 and γ = 1 have 98.1 % and 97.4 %.
    gamma: Range = (0.9, 1.1)

    @field_validator("log10_lambda", "gamma")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not value[0] < value[1]:
            raise ValueError("the lower end must be below the upper end")
        return value

    @model_validator(mode="after")
    def _anchor_within(self) -> Self:
        if not self.gamma[0] <= 1.0 <= self.gamma[1]:
            raise ValueError("gamma must include 1, where the anchor stands")
        return self


class ClusterSettings(Part):
    """The Dask cluster that computes Gram matrices: an address, or local worker processes."""

    scheduler: str | None = Field(default=None, description="tcp://host:port of a running scheduler")
    workers: int = Field(default=2, ge=1)
    memory_limit: str = Field(default="8GiB", pattern=SIZE_PATTERN)


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
    experts: tuple[ExpertSource, ...] = Field(min_length=2)
    output: str = Field(min_length=1)
    anchor: AnchorSettings = TSVSettings()
    grams: GramSettings = ActivationGrams()
    regression: RegressionSettings = RegressionSettings()
    search: SearchSettings = SearchSettings()
    cluster: ClusterSettings = ClusterSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    coverage: CoverageSettings = CoverageSettings()
    tracking: TrackingSettings = TrackingSettings()
    dtype: Literal["base", "float32", "bfloat16", "float16"] = Field(
        default="base", description="dtype of the written weights"
    )
    max_shard_size: str = Field(default="2GiB", pattern=SIZE_PATTERN, description="largest weight file of the output")
    folder: SkipJsonSchema[Path] = Field(
        default=Path("."), exclude=True, repr=False, description="set by from_yaml, not by users"
    )

    @field_validator("experts")
    @classmethod
    def _distinct_names(cls, value: tuple[ExpertSource, ...]) -> tuple[ExpertSource, ...]:
        names = [expert.name.lower() for expert in value]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"the name '{twice[0]}' is given to two experts; give each its own")
        if "mean" in names:
            raise ValueError("an expert cannot be called 'mean', which is where the means over tasks stand; rename it")
        return value

    @model_validator(mode="after")
    def _grams_of_every_expert(self) -> Self:
        if isinstance(self.grams, ArtifactGrams):
            self.grams.folders(tuple(expert.name for expert in self.experts))
        return self

    @model_validator(mode="after")
    def _mode_by_source(self) -> Self:
        if self.grams.source == "activations":
            return self
        if "mode" not in self.regression.model_fields_set:
            settings = self.regression.model_copy(update={"mode": "module-wise"})
            object.__setattr__(self, "regression", settings)
        if self.regression.mode == "propagated":
            raise ValueError(
                f"'regression.mode': propagated regression reads the calibration rows itself, so it cannot use Gram "
                f"matrices from '{self.grams.source}'; set grams.source to activations or the mode to module-wise"
            )
        return self

    @classmethod
    def from_yaml(cls, path: str | Path) -> Recipe:
        """Read a recipe from a YAML file.

        Raises:
            RecipeError: the file is missing, is not YAML, or says something a recipe cannot say.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise RecipeError(f"there is no recipe at {path}; `bmm init DIR` writes one") from None
        except IsADirectoryError:
            raise RecipeError(f"{path} is a folder; name the recipe's YAML file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"the recipe {path} cannot be read: {error}") from None
        try:
            value = yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506 - a SafeLoader
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            # PyYAML lets through what Python says of an impossible date or number.
            raise RecipeError(f"the recipe {path} is not valid YAML: {_one_line(error)}") from None
        if not isinstance(value, dict):
            raise RecipeError(f"the recipe {path} must be a mapping of keys such as base_model, experts, output")
        return cls.from_mapping(value, folder=path.resolve().parent, where=str(path))

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
            return cls.model_validate({**value, "folder": Path(folder).resolve()})
        except ValidationError as error:
            raise RecipeError(f"{where}: {_explain(error)}") from None

    def resolve(self, path: str) -> Path:
        """Return `path` as an absolute path, taken from the recipe's folder where it is relative."""
        return (self.folder / Path(path).expanduser()).resolve()

    def document(self) -> dict[str, Any]:
        """Return the recipe as plain JSON values, defaults filled in, without the folder it was read from."""
        return self.model_dump(mode="json")


# `<<: *name` takes in another mapping's keys and may stand several times.
_MERGE_TAG = "tag:yaml.org,2002:merge"


class _UniqueKeyLoader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML as PyYAML reads it safely, but a key given twice is an error instead of a silent last one."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Refuse repeated keys, then build the mapping."""
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == _MERGE_TAG:
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.MarkedYAMLError(problem=f"the key '{key}' is given twice", problem_mark=key_node.start_mark)
            seen.add(key if isinstance(key, str) else id(key_node))
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return mapping


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _explain(error: ValidationError) -> str:
    """Return the first mistake as one sentence that names its key."""
    first = error.errors()[0]
    parts = [str(part) for part in first["loc"]]
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
