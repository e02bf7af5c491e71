"""What a user asks for: one frozen model, read from YAML, with its JSON Schema published.

Only the words live here. Whether the files that a recipe names exist and fit together is checked by
`bmm.sources`; nothing in this module touches a disk beyond the recipe's own file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic.json_schema import SkipJsonSchema

from bmm.anchors.settings import AnchorSettings, Method, TSVSettings, of_method
from bmm.cluster.settings import ClusterSettings
from bmm.completion import Choices, complete
from bmm.errors import RecipeError
from bmm.grams.settings import ActivationGrams, GramSettings
from bmm.kinds.settings import SplitSource, Task
from bmm.part import SIZE_PATTERN, Part
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
    search: Search = SearchSettings()
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
            return needs
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
