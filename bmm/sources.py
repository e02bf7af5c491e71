"""What a recipe names, found and fingerprinted: the inputs of a merge, before any work.

From here on nothing is known by its path: stages are keyed by the digests taken here. Reading headers and hashing
files happens here; opening rows and weights does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bmm.anchors.settings import CheckpointAnchorSettings
from bmm.checkpoint.adapter import AdapterCheckpoint
from bmm.checkpoint.allowed import check_allowed
from bmm.checkpoint.folder import check_writable
from bmm.checkpoint.reader import Checkpoint
from bmm.checkpoint.resolve import Resolved, resolve
from bmm.checkpoint.shards import read_json_object
from bmm.checkpoint.verified import fingerprint, fingerprinting, open_checkpoint, open_verified
from bmm.digest import digest_file
from bmm.errors import DataError, RecipeError
from bmm.evaluation.data import source_files
from bmm.evaluation.tables import FOLDERS
from bmm.grams.published import PublishedGrams, find
from bmm.grams.settings import ArtifactGrams
from bmm.imports import import_torch_and_transformers
from bmm.kinds.lm_eval_file import TaskFile, require_package
from bmm.kinds.model_classes import task_of
from bmm.kinds.settings import DEFAULT_KIND, FILES, PROCESSOR, SPLITS, LmEval, SplitSource
from bmm.recipe import ExpertSource, Recipe

_WORTH_IMPORTING = 1 << 30
"""Bytes of models; fewer are read before torch has been imported."""


@dataclass(frozen=True)
class Model:
    """A checkpoint: where the recipe says it is, where it lies, and the digest of its files.

    `base` is where the base of an adapter lies; None for a whole model.
    """

    source: str
    path: str
    revision: str | None
    digest: str
    base: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the model as plain JSON values."""
        return dict(vars(self))

    def open(self) -> Checkpoint:
        """Open the checkpoint, if its files are still those that were fingerprinted.

        Raises:
            CheckpointError: they have changed since.
        """
        return open_verified(Path(self.path), self.digest, Path(self.base) if self.base else None)


@dataclass(frozen=True)
class Expert:
    """An expert with its task: `data` holds, for each split, the request and the digests of its files."""

    name: str
    model: Model
    task: Mapping[str, Any]
    data: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return the expert as plain JSON values."""
        return {**vars(self), "model": self.model.to_json()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Expert:
        """Read an expert back from `to_json`'s values."""
        return cls(value["name"], Model(**value["model"]), value["task"], value["data"])


@dataclass(frozen=True)
class Inputs:
    """Everything that a merge starts from."""

    base: Model
    experts: tuple[Expert, ...]
    anchor: Model | None
    grams: Mapping[str, PublishedGrams] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the inputs as plain JSON values."""
        return {
            "base": self.base.to_json(),
            "experts": [expert.to_json() for expert in self.experts],
            "anchor": None if self.anchor is None else self.anchor.to_json(),
            "grams": {name: grams.to_json() for name, grams in self.grams.items()},
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Inputs:
        """Read inputs back from `to_json`'s values."""
        return cls(
            base=Model(**value["base"]),
            experts=tuple(Expert.from_json(expert) for expert in value["experts"]),
            anchor=None if value["anchor"] is None else Model(**value["anchor"]),
            grams={name: PublishedGrams(**grams) for name, grams in value["grams"].items()},
        )


def fingerprint_inputs(recipe: Recipe, *, check_output_folder: bool = True) -> Inputs:
    """Find everything that the recipe names and take its digests.

    The output folder is checked first, unless it will not be written.

    Raises:
        UserError: something is missing, is not a usable checkpoint, or may not be read; the message names it.
    """
    if check_output_folder:
        check_output(recipe)
    found = resolve(recipe.base_model, recipe.folder, "base_model")
    experts = [(expert, resolve_expert(expert, recipe)) for expert in recipe.experts]
    with fingerprinting([found.path, *(resolved.path for _, resolved in experts)]) as size:
        if size > _WORTH_IMPORTING:
            # Reading leaves Python idle, and whatever is not done already will need them.
            import_torch_and_transformers()
    base = _fingerprinted(found)
    return with_experts(recipe, base, [fingerprint_expert(*expert, recipe, base) for expert in experts])


def with_experts(recipe: Recipe, base: Model, experts: Sequence[Expert]) -> Inputs:
    """Return what a recipe names beside base and experts together with these.

    Raises:
        UserError: something is missing or cannot be used; the message names it.
    """
    anchor = None
    if isinstance(recipe.anchor, CheckpointAnchorSettings):
        anchor = fingerprint_model(recipe.anchor.path, recipe.folder, "anchor.path", base)
    return Inputs(base, tuple(experts), anchor, _given_grams(recipe))


def check_output(recipe: Recipe) -> None:
    """Refuse, early and without leaving anything behind, an output folder that could not be written at the end.

    Raises:
        UserError: the folder is one of the inputs, is somebody else's, or cannot be written.
    """
    output = recipe.resolve(recipe.output)
    check_allowed(output, "the output folder")
    named = [("base_model", recipe.base_model), *((f"the expert {e.name}", e.model) for e in recipe.experts)]
    if isinstance(recipe.anchor, CheckpointAnchorSettings):
        named.append(("the anchor", recipe.anchor.path))
    if isinstance(recipe.grams, ArtifactGrams):
        folders = recipe.grams.folders(tuple(expert.name for expert in recipe.experts))
        named += [(f"the Gram matrices of {name}", path) for name, path in folders.items()]
    for what, source in named:
        taken = recipe.resolve(source)
        if output == taken or output in taken.parents:
            raise RecipeError(f"'output': {output} holds {what}; name another folder")
    check_writable(output)


def _given_grams(recipe: Recipe) -> dict[str, PublishedGrams]:
    """Find the Gram matrices that were made elsewhere, by expert; none for any other source."""
    if not isinstance(recipe.grams, ArtifactGrams):
        return {}
    folders = recipe.grams.folders(tuple(expert.name for expert in recipe.experts))
    return {name: find(recipe.resolve(path), f"the Gram matrices of {name}") for name, path in folders.items()}


def fingerprint_model(source: str, folder: Path, where: str, base: Model | None = None) -> Model:
    """Find one checkpoint, or an adapter of the base that is given, and take its digest.

    Raises:
        UserError: it is not there, or cannot be used; the message begins with `where`.
    """
    return _fingerprinted(resolve(source, folder, where), base)


def _fingerprinted(resolved: Resolved, base: Model | None = None) -> Model:
    with open_checkpoint(resolved.path, Path(base.path) if base else None) as checkpoint:
        over = str(checkpoint.base.path) if isinstance(checkpoint, AdapterCheckpoint) else None
        return Model(resolved.source, str(resolved.path), resolved.revision, fingerprint(checkpoint), over)


def resolve_expert(expert: ExpertSource, recipe: Recipe) -> Resolved:
    """Find one expert's model folder, fetching it where it lives elsewhere; raises as `resolve`."""
    return resolve(expert.model, recipe.folder, f"the expert {expert.name}")


def fingerprint_expert(expert: ExpertSource, resolved: Resolved, recipe: Recipe, base: Model) -> Expert:
    """Find one expert's rows, and take their digests and its model's.

    Raises:
        UserError: something is missing, is not a usable checkpoint, or may not be read; the message names it.
        ModelAwayError: the server that it is on does not answer.
    """
    model = _fingerprinted(resolved, base)
    data: dict[str, Any] = {}
    column = _file_column(expert.task)
    for split, source in expert.splits().items():
        files = split_files(expert, split, source, recipe.folder, column)
        for path in files:
            check_allowed(path, f"the {split} data of the expert {expert.name}")
        request = source.model_dump(mode="json", exclude={"data_files", "path"} if files else set())
        # Local rows are known by their bytes, wherever the files lie; rows on a hub by the revision asked for.
        data[split] = {"builder": Path(source.path).name, **request, "files": [digest_file(path) for path in files]}
        if source.path in FOLDERS:
            # The folder's name is the label.
            data[split]["names"] = [f"{path.parent.name}/{path.name}" for path in files]
    task = expert.task.model_dump(mode="json", exclude=SPLITS) if expert.task else _task_without_rows(expert, model)
    if isinstance(expert.task, LmEval):
        # What the file says decides the results, not where it lies.
        del task["file"]
        task |= TaskFile.read(recipe.resolve(expert.task.file)).asked(expert.task)
    if column is not None and not (Path(model.path) / PROCESSOR).is_file() and (Path(base.path) / PROCESSOR).is_file():
        # Its files are read as the base's are; what the file says decides the results, not where it lies.
        task["processor"] = read_json_object(Path(base.path) / PROCESSOR)
    return Expert(expert.name, model, task, data)


def require_unchanged(expert: Expert, task: Any, folder: Path) -> None:
    """Make sure that the rows just read are those that were fingerprinted.

    Args:
        expert: as it was fingerprinted.
        task: the recipe's settings of its task.
        folder: what relative paths are taken from.

    Raises:
        DataError: a file of rows was replaced meanwhile.
    """
    asked = ExpertSource(name=expert.name, model=expert.model.source, task=task)
    for split, source in asked.splits().items():
        files = split_files(asked, split, source, folder, _file_column(task))
        for path, digest in zip(files, expert.data[split]["files"], strict=False):
            if digest_file(path) != digest:
                raise DataError(
                    f"{path}, {split} rows of the expert {expert.name}, was changed while the merge was running; run "
                    "the merge again to use the new rows"
                )
        if len(files) != len(expert.data[split]["files"]):
            raise DataError(
                f"the {split} rows of the expert {expert.name} have other files than when the merge began; run the "
                "merge again to use them"
            )


def _file_column(task: Any) -> str | None:
    """Return the column that names files of images or sounds, if the task has one."""
    return next((found for key in FILES if (found := getattr(task, key, None)) is not None), None)


def split_files(
    expert: ExpertSource, split: str, source: SplitSource, folder: Path, named: str | None = None
) -> list[Path]:
    """Return the local files behind one split of an expert's task; none for a data set on a hub.

    `named` is a column that may hold paths of images or sounds, which are behind the split too.

    Raises:
        UserError: a file does not exist, or cannot be used; a package that reads it is not installed.
    """
    where = f"the expert {expert.name}, {split}"
    if isinstance(expert.task, LmEval):
        require_package()
        return TaskFile.read((folder / Path(source.path).expanduser()).resolve()).files(
            source.split, expert.task, where
        )
    return source_files(source, folder, where=where, named=named)


def _task_without_rows(expert: ExpertSource, model: Model) -> dict[str, Any]:
    """Return the settings of a task of which the recipe says nothing, by the class of the expert's model.

    Raises:
        RecipeError: the expert is of no class that says its kind.
    """
    with model.open() as checkpoint:
        task = task_of(checkpoint.config)
    if task is None:
        raise RecipeError(
            f"the expert {expert.name}: {model.path}/config.json does not say what kind of task it is for; "
            f"name one in the recipe, as in task: {{kind: {DEFAULT_KIND}}}"
        )
    return task
