"""Experts that a recipe leaves to be found: `find` in its list of experts, a line that stands for many.

    experts:
      - find: ./experts/*                 # or s3://bucket/experts/*
        task:
          calibration: {path: json, data_files: "data/{name}/calibration.jsonl", rows: 256}

Each folder that holds a model is an expert, called as the folder. Its task is the `task.yaml` in the folder, whose
paths start there; without one, the line's own, in which `{name}` and `{folder}` stand for the expert's. Whether what
was found can be used is not asked here.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, TypeAdapter, ValidationError

from bmm.errors import RecipeError
from bmm.kinds.settings import SPLITS, Task
from bmm.part import Part
from bmm.recipe_file import parse

TASK_FILE = "task.yaml"
_MARKERS = ("config.json", "adapter_config.json", "*.safetensors")
_MERGED = "merge.json"
_BUCKET = "s3://"
_BUILDERS = {"json", "csv", "parquet", "text", "imagefolder", "audiofolder"}


class ExpertSearch(Part):
    """Experts to be found: every folder that fits the pattern and holds a model."""

    find: str = Field(min_length=1, description="folders, as ./experts/* (** for any depth), or s3://bucket/prefix/*")
    task: Task | None = Field(
        default=None,
        description="that of each expert without a task.yaml of its own; {name} and {folder} stand for the expert's",
    )


def expand(value: Mapping[str, Any], folder: Path, broken: dict[str, str] | None = None) -> dict[str, Any]:
    """Return a recipe's plain values with every expert by name, those that were to be found in order behind the others.

    Args:
        value: the recipe's keys and values, as they stand in its file.
        folder: where relative paths start.
        broken: takes, by name, what is wrong with experts whose `task.yaml` cannot be read, which are then left out.

    Raises:
        ValidationError: a line that finds experts has an unknown key or an impossible value.
        RecipeError: two experts have one name, or a `task.yaml` cannot be read.
        CheckpointError: a bucket refuses.
        ModelAwayError: a bucket does not answer.
    """
    entries = value.get("experts")
    if not isinstance(entries, list | tuple) or not any(map(_finds, entries)):
        return dict(value)
    named = [entry for entry in entries if not _finds(entry)]
    taken = {(folder / str(entry.get("model"))).resolve() for entry in named if isinstance(entry, dict)}
    taken |= {(folder / str(value[key])).resolve() for key in ("base_model", "output") if key in value}
    found: list[dict[str, Any]] = []
    for entry in entries:
        if _finds(entry):
            search = ExpertSearch.model_validate(entry)
            if search.find.startswith(_BUCKET):
                found += _bucket(search, entry, broken)
            else:
                found += _local(search, entry, folder, taken, broken)
    if not found and not named:
        finds = next(entry["find"] for entry in entries)
        raise RecipeError(f"'experts': nothing that fits '{finds}' holds a model; put experts there, or correct it")
    return {**value, "experts": [*named, *sorted(found, key=lambda one: str(one["name"]))]}


def _finds(entry: Any) -> bool:
    return isinstance(entry, dict) and "find" in entry


def _local(
    search: ExpertSearch, entry: Mapping[str, Any], folder: Path, taken: set[Path], broken: dict[str, str] | None
) -> Iterator[dict[str, Any]]:
    pattern = str(Path(folder, Path(search.find).expanduser()))
    for place in sorted(map(Path, glob.glob(pattern, recursive=True))):
        if not place.is_dir() or place.resolve() in taken or (place / _MERGED).exists():
            continue
        if place.name.startswith((".", "_")) or not any(any(place.glob(marker)) for marker in _MARKERS):
            continue
        taken.add(place.resolve())
        model = f"./{place.relative_to(folder).as_posix()}" if place.is_relative_to(folder) else str(place)
        yield from _expert(place, model, entry, broken, own_task=(place / TASK_FILE).is_file())


def _bucket(search: ExpertSearch, entry: Mapping[str, Any], broken: dict[str, str] | None) -> Iterator[dict[str, Any]]:
    # obstore, which a recipe without buckets has no use for.
    from bmm.checkpoint.bucket import fetch, folders_below

    prefix, star, rest = search.find.partition("/*")
    if not star or rest:
        raise RecipeError(f"'experts': '{search.find}' is not of the form s3://bucket/prefix/*; correct it")
    for one in folders_below(prefix, f"'experts', {search.find}"):
        own_task = one.holds(TASK_FILE)
        if own_task:
            fetch(one)
        yield from _expert(one.path, one.source, entry, broken, own_task=own_task)


def _expert(
    place: Path, model: str, entry: Mapping[str, Any], broken: dict[str, str] | None, *, own_task: bool
) -> Iterator[dict[str, Any]]:
    """Yield the plain values of one expert that was found, unless its task is broken."""
    name = "".join(one if (one.isascii() and one.isalnum()) or one in "_.-" else "-" for one in place.name)
    name = name.lstrip("_.-")[:64] or "expert"
    found: dict[str, Any] = {"name": name, "model": model}
    try:
        task = _own_task(place) if own_task else entry.get("task")
    except RecipeError as error:
        if broken is None:
            raise
        broken[name] = str(error)
        return
    if task is not None:
        found["task"] = task if own_task else _filled(task, {"{name}": place.name, "{folder}": str(place)})
    yield found


def _own_task(place: Path) -> Any:
    """Return the task beside an expert, its paths as they are from anywhere.

    Raises:
        RecipeError: the file cannot be read, or says what no task says.
    """
    path = place / TASK_FILE
    try:
        task = parse(path.read_text(encoding="utf-8"))
        TypeAdapter[Any](Task).validate_python(task)
    except (OSError, ValueError) as error:
        said = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise RecipeError(f"{path} is not a task as it stands in a recipe: {said}; correct it") from None
    if "file" in task:
        task["file"] = str(place / task["file"])
    for split in SPLITS & task.keys():
        source = task[split] = dict(task[split])
        if files := source.get("data_files"):
            beside = [str(place / one) for one in ([files] if isinstance(files, str) else files)]
            source["data_files"] = beside[0] if isinstance(files, str) else beside
        elif source["path"] not in _BUILDERS and (place / source["path"]).exists():
            source["path"] = str(place / source["path"])
    return task


def _filled(value: Any, words: Mapping[str, str]) -> Any:
    """Return plain values with some words replaced in every text."""
    if isinstance(value, str):
        for word, meaning in words.items():
            value = value.replace(word, meaning)
        return value
    if isinstance(value, Mapping):
        return {key: _filled(part, words) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_filled(part, words) for part in value]
    return value
