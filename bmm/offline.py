"""What can be known of a recipe without the network, without a weight and without a row: `bmm plan --offline`.

Keys and values are the recipe's own to check (`bmm.recipe`). Here: whether models and data have names that could be
found, whether splits are apart by their definition, whether local files are there; and, said as plainly, what nobody
can know from here. How much memory and disk the merge takes is `bmm.estimate`'s.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

from bmm.anchors.settings import CheckpointAnchorSettings
from bmm.checkpoint.resolve import scheme_of
from bmm.errors import CheckpointError, DataError
from bmm.estimate import StagePlan, estimate_stages, worker_shortage
from bmm.hub import hub_id
from bmm.kinds.settings import DEFAULT_KIND, SplitSource
from bmm.outline import outline_of_config, read_config
from bmm.recipe import Recipe
from bmm.row_counts import calibration_rows
from bmm.sources import check_output, split_files

_SHOWN = 3
_SLICE = re.compile(r"(?P<name>[^\[\]]+)(\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


@dataclass(frozen=True)
class Findings:
    """What holds, what is doubtful, and what offline cannot tell: a sentence each."""

    checked: tuple[str, ...]
    warnings: tuple[str, ...]
    not_checked: tuple[str, ...]


def check_offline(recipe: Recipe) -> Findings:
    """Check a recipe as far as it goes without the network.

    Raises:
        UserError: what a merge would refuse, too: a name that cannot be one, a missing local file, splits that share
            rows by definition, an output folder that cannot be written.
    """
    check_output(recipe)
    models = dict(_models(recipe))
    hub_models = {where: source for where, source in models.items() if _is_on_hub(recipe, source, where)}
    warnings = [*_shared(models), *_doubtful_splits(recipe)]
    hub_data = dict(_data_on_hub(recipe))
    unpinned = [
        *(source for source in hub_models.values() if "@" not in source),
        *(source.path for source in hub_data.values() if source.revision is None),
    ]
    if unpinned:
        named = list(dict.fromkeys(unpinned))
        warnings.append(
            f"{_count(len(named), 'hub id')} without a revision, which mean whatever is newest when they are fetched: "
            f"{_some(named)}"
        )
    splits = sum(len(expert.splits()) for expert in recipe.experts)
    checked = [
        "every key is one of the recipe's, and every value is possible",
        f"{len(recipe.experts)} experts with names of their own; {_kinds(recipe)}",
        f"{len(models)} models and {splits} splits: {_count(len(hub_models), 'model')} and "
        f"{_count(len(hub_data), 'split')} on a hub, with ids that a hub could have; the rest are local and there",
        f"the output folder {recipe.resolve(recipe.output)} can be written",
    ]
    return Findings(tuple(checked), tuple(warnings), tuple(_unknown(recipe, bool(hub_models), bool(hub_data))))


def known_config(recipe: Recipe) -> Path | None:
    """Return where the base's configuration is on this machine: in its folder, or kept beside the recipe; or None.

    `configs/OWNER--NAME.json` beside the recipe stands for the config.json of the hub's OWNER/NAME.
    """
    found = hub_id(recipe.base_model)
    places = [recipe.resolve(recipe.base_model) / "config.json"]
    if found is not None:
        places.append(recipe.folder / "configs" / f"{found.repository.replace('/', '--')}.json")
    return next((place for place in places if place.is_file()), None)


def estimate_offline(recipe: Recipe, config: Path) -> tuple[tuple[StagePlan, ...], int]:
    """Return what each stage needs, and the bytes of the output, from a configuration instead of a checkpoint.

    Raises:
        CheckpointError: the configuration describes no model that transformers has for the recipe's tasks.
        RecipeError: a Gram worker needs more memory than the recipe allows it.
    """
    from bmm.kinds.registry import kind_of

    kind = kind_of(recipe.experts[0].task.kind if recipe.experts[0].task else DEFAULT_KIND)
    outline = outline_of_config(read_config(config), kind.architecture, str(config))
    # Without a task there are no rows either.
    tokens = [
        outline.tokens(expert.task.model_dump(), recipe.resolve(expert.model)) if expert.task else 0
        for expert in recipe.experts
    ]
    stages = estimate_stages(recipe, outline, tokens, calibration_rows(recipe))
    if (shortage := worker_shortage(stages, recipe)) is not None:
        raise shortage[1]
    return stages, outline.stored_bytes


def _models(recipe: Recipe) -> Iterator[tuple[str, str]]:
    yield "base_model", recipe.base_model
    for expert in recipe.experts:
        yield f"the expert {expert.name}", expert.model
    if isinstance(recipe.anchor, CheckpointAnchorSettings):
        yield "anchor.path", recipe.anchor.path


def _is_on_hub(recipe: Recipe, source: str, where: str) -> bool:
    """Say whether a model is a hub's, by its name; refuse what cannot be found anywhere."""
    local = recipe.resolve(source)
    if local.is_dir():
        if not any((local / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise CheckpointError(f"{where}: {local} has no config.json; name a folder that holds a model")
        return False
    if local.exists():
        raise CheckpointError(f"{where}: {local} is a file; name the model folder that holds it")
    if scheme_of(source) is not None:
        return False
    found = hub_id(source)
    if found is None:
        raise CheckpointError(
            f"{where}: there is no folder {local}, and '{source}' is not a hub id such as owner/name@revision; "
            "correct it"
        )
    if found.mistake:
        raise CheckpointError(f"{where}: '{source}' {found.mistake}; correct it")
    return True


def _data_on_hub(recipe: Recipe) -> Iterator[tuple[str, SplitSource]]:
    """Return the splits that are on a hub; local ones are looked for."""
    for expert in recipe.experts:
        for split, source in expert.splits().items():
            where = f"the expert {expert.name}, {split}"
            found = hub_id(source.path)
            if split_files(expert, split, source, recipe.folder) or found is None:
                continue
            if found.mistake:
                raise DataError(f"{where}: the data set '{source.path}' {found.mistake}; correct `path`")
            yield where, source


def _shared(models: Mapping[str, str]) -> Iterator[str]:
    """Say which models are named twice."""
    first: dict[str, str] = {}
    for where, source in models.items():
        if source in first:
            yield f"{first[source]} and {where} are the same model, {source}"
        first.setdefault(source, where)


def _doubtful_splits(recipe: Recipe) -> Iterator[str]:
    """Refuse splits that share rows by definition, and name those of which nothing can be told."""
    for expert in recipe.experts:
        for (one, first), (other, second) in combinations(expert.splits().items(), 2):
            apart = disjoint(first, second)
            if apart is None:
                yield f"the expert {expert.name}: whether {one} and {other} share rows shows only when they are read"
            elif not apart:
                raise DataError(
                    f"the expert {expert.name}: {one} and {other} are taken from the same rows "
                    f"({_shown(first)} and {_shown(second)}); give them other splits, slices such as train[:512] and "
                    "train[512:], or other parts of one order with `rows` and `skip`"
                )


def disjoint(first: SplitSource, second: SplitSource) -> bool | None:
    """Say whether two splits share no row by their definition; None if their definition does not tell.

    Other data sets, other files and other splits of one data set count as apart: whether the same row stands in both
    shows when they are read. Slices of one split, and parts of one seeded order, are compared by their bounds.
    """
    if _table(first) != _table(second):
        return True
    names = [_SLICE.fullmatch(source.split) for source in (first, second)]
    if names[0] is None or names[1] is None:
        return False if first.split == second.split and _whole(first) and _whole(second) else None
    if names[0]["name"] != names[1]["name"]:
        return True
    if first.split == second.split:
        return _parts_disjoint(first, second)
    bounds = [_bounds(match) for match in (names[0], names[1])]
    if bounds[0] is None or bounds[1] is None:
        return None
    (unit, start, stop), (other_unit, other_start, other_stop) = bounds[0], bounds[1]
    if unit and other_unit and unit != other_unit:
        return None
    if max(start, other_start) >= min(stop, other_stop):
        return True
    return False if _whole(first) and _whole(second) else None


def _table(source: SplitSource) -> tuple[Any, ...]:
    files = source.data_files if isinstance(source.data_files, list) else [source.data_files]
    return source.path, source.name, source.revision, tuple(files)


def _whole(source: SplitSource) -> bool:
    return source.rows is None and not source.skip


def _parts_disjoint(first: SplitSource, second: SplitSource) -> bool | None:
    """Compare what two samples of one split take of their orders."""
    if _whole(first) or _whole(second):
        return False
    if first.seed != second.seed:
        return None
    parts = sorted(
        (source.skip, source.skip + source.rows if source.rows else float("inf")) for source in (first, second)
    )
    return all(end <= start for (_, end), (start, _) in pairwise(parts))


def _bounds(match: re.Match[str]) -> tuple[str, float, float] | None:
    """Return unit, start and stop of a slice; None where they are counted from the end."""
    given = [bound for bound in (match["start"], match["stop"]) if bound]
    units = {"%" if bound.endswith("%") else "rows" for bound in given}
    if len(units) > 1 or any(bound.startswith("-") for bound in given):
        return None
    start, stop = (float(bound.rstrip("%")) if bound else None for bound in (match["start"], match["stop"]))
    return "".join(units), start or 0.0, float("inf") if stop is None else stop


def _unknown(recipe: Recipe, hub_models: bool, hub_data: bool) -> Iterator[str]:
    """Say what only a connection, a weight or a row can tell."""
    if hub_models:
        yield (
            "whether the hub's models exist, may be fetched, have safetensors, and fit the base tensor by tensor "
            "(`bmm plan` without --offline)"
        )
    if any(scheme_of(source) for _, source in _models(recipe)):
        yield "whether the registry has the models named by a URI"
    if hub_data:
        yield "whether the hub's data sets, their configurations, splits and columns exist, and have rows enough"
    if any(expert.splits() for expert in recipe.experts):
        yield "whether rows can be read, labels are among the classes, and no row stands in two splits (by digest)"
    if any(expert.task is None for expert in recipe.experts):
        yield "what kind of task an expert is for of which the recipe does not say it"
    yield "how good the merged model will be"


def _kinds(recipe: Recipe) -> str:
    """Say which kinds of task there are, and that what belongs to them is given."""
    tasks = [expert.task for expert in recipe.experts if expert.task is not None]
    said = [f"{len(recipe.experts) - len(tasks)} without a task"] if len(tasks) < len(recipe.experts) else []
    for kind in dict.fromkeys(task.kind for task in tasks):
        some = [task for task in tasks if task.kind == kind]
        text = f"{len(some)} x {kind}"
        for part in ("classes", "templates"):
            sizes = [len(getattr(task, part, ())) for task in some]
            text += f", {_range(sizes)} {part}" if any(sizes) else ""
        said.append(text)
    return ", ".join(said)


def _range(numbers: Iterable[int]) -> str:
    low, high = min(values := list(numbers)), max(values)
    return str(low) if low == high else f"{low} to {high}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _shown(source: SplitSource) -> str:
    part = "" if _whole(source) else f", rows {source.rows} after {source.skip}"
    return f"{source.path} {source.split}{part}"
