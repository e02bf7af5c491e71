"""A first recipe for a folder of experts: what `bmm init` finds and writes.

Looks for checkpoints and for rows beside them, by the names that people give such folders and files; what it cannot
find it leaves as a placeholder and says so. Nothing is loaded but headers and the first rows' column names.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from typing import Any

from bmm.checkpoint.allowed import check_allowed
from bmm.checkpoint.reader import Checkpoint
from bmm.checkpoint.shards import read_json_object
from bmm.errors import CheckpointError, DataError, OutputError, UserError
from bmm.kinds.model_classes import HEADS, kind_of_class
from bmm.kinds.settings import DEFAULT_KIND, SplitSource
from bmm.recipe_text import AudioKeys, ExpertEntry, ImageKeys, TextKeys, recipe_text

_FILE = "recipe.yaml"
_SPLITS = {
    "calibration": ("calibration", "train"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "heldout"),
}
_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_TEXT_COLUMNS = ("text", "sentence", "content", "review", "document", "body", "tweet", "message", "question")
_COLUMNS = {
    "text-classification": ("text", _TEXT_COLUMNS),
    "image-classification": ("image", ("image", "img", "picture", "pixels", "path", "file_name", "file")),
    "audio-classification": ("audio", ("audio", "sound", "speech", "recording", "path", "file_name", "file")),
}
"""By kind of task, the setting that names the column of what an expert reads, and what people call such a column."""
_LABEL_COLUMNS = ("label", "labels", "class", "category", "target", "sentiment")
_LONGEST = 128
# With room for a number behind it.
_LONGEST_NAME = 60
_ADAPTER = "adapter_config.json"
# A language model may be a base as well as an expert; experts of all other kinds are none.
_NO_BASES = HEADS.keys() - {"causal-lm", "seq2seq-lm"}


def write_recipe(folder: Path, *, force: bool = False) -> dict[str, Any]:
    """Write `recipe.yaml` into a folder of checkpoints and return what was found and what is left to complete.

    Raises:
        UserError: the folder is missing, lies outside of `BMM_ALLOWED_FOLDERS`, holds fewer than two classifiers, or
            holds a recipe already.
    """
    check_allowed(folder, "the folder of experts")
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; name the folder that holds your experts")
    target = folder / _FILE
    if target.exists() and not force:
        raise OutputError(f"{target} is there already; edit it, or replace it with --force")
    bases, experts = _checkpoints(folder)
    if len(experts) < 2:
        raise UserError(
            f"{folder} holds {len(experts)} classifiers of texts, images or sounds in safetensors, a merge needs at "
            "least two; put each expert into a folder of its own, as save_pretrained writes it"
        )
    gaps = []
    base = f"./{bases[0].relative_to(folder).as_posix()}" if bases else "./base"
    if not bases:
        gaps.append("base_model: no base was found; name its folder or hub id")
    entries: list[ExpertEntry] = []
    positions = _positions(bases[0]) if bases else _LONGEST
    for path, kind in experts.items():
        entry, missing = _entry(folder, path, kind, positions)
        entry = replace(entry, name=_distinct(entry.name, [other.name for other in entries]))
        entries.append(entry)
        gaps += [f"{entry.name}: {gap}" for gap in missing]
    text = recipe_text(entries, file=_FILE, output="./merged", anchor="wudi", trials=24, seed=0, base=base)
    try:
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"{target} cannot be written: {error.strerror}; name a folder that you may write to"
        ) from None
    return {"recipe": str(target), "base": base, "experts": [entry.name for entry in entries], "to_complete": gaps}


def _checkpoints(folder: Path) -> tuple[list[Path], dict[Path, str]]:
    """Return the folders that hold encoders without a head of ours, and those of experts with their kinds of task."""
    bases: list[Path] = []
    experts: dict[Path, str] = {}
    for config in sorted([*folder.glob("*/config.json"), *folder.glob("*/*/config.json")]):
        # An earlier merge's output is neither, and what lies beside an adapter is the adapter's.
        if (config.parent / "merge.json").exists() or (config.parent / _ADAPTER).exists():
            continue
        try:
            with Checkpoint.open(config.parent) as checkpoint:
                architectures: list[str] = checkpoint.config.get("architectures") or [""]
        except CheckpointError:
            continue
        kind = kind_of_class(architectures[0])
        if config.parent.name == "base" or kind not in _NO_BASES:
            bases.append(config.parent)
        elif kind in _COLUMNS:
            experts[config.parent] = kind
    for config in sorted([*folder.glob(f"*/{_ADAPTER}"), *folder.glob(f"*/*/{_ADAPTER}")]):
        experts[config.parent] = _adapted_kind(config)
    bases.sort(key=lambda path: (path.name != "base", len(path.parts), path))
    return bases, dict(sorted(experts.items()))


def _adapted_kind(config: Path) -> str:
    """Return the kind of task that an adapter was trained for; of one that does not say its class, texts."""
    try:
        name = str((read_json_object(config).get("auto_mapping") or {}).get("base_model_class"))
    except (CheckpointError, AttributeError):
        return DEFAULT_KIND
    kind = kind_of_class(name)
    return kind if kind in _COLUMNS else DEFAULT_KIND


def _entry(folder: Path, path: Path, kind: str, positions: int) -> tuple[ExpertEntry, list[str]]:
    """Return an expert's part of the recipe and what is missing from it."""
    name = "".join(one if (one.isascii() and one.isalnum()) or one in "_.-" else "-" for one in path.name)
    splits, missing = {}, []
    for split, names in _SPLITS.items():
        found = _rows(folder, path, names)
        if found is None:
            missing.append(f"no {split} rows were found; name their file in {split}.data_files")
        splits[split] = found or f"data/{path.name}/{split}.jsonl"
    if splits["calibration"].rpartition("/")[2].startswith("train"):
        missing.append("the calibration rows are the training rows; give `rows:` a number to take a sample")
    what, wanted = _COLUMNS[kind]
    column, label, columns = _columns(folder, splits["validation"], what, wanted)
    if columns and column not in columns:
        missing.append(f"no {what} column was recognised among {', '.join(columns)}; name it in task.{what}")
    if columns and label not in columns:
        missing.append(f"no label column was recognised among {', '.join(columns)}; name it in task.label")
    if what == "image":
        task: TextKeys | ImageKeys | AudioKeys = ImageKeys(image=column, label=label)
    elif what == "audio":
        task = AudioKeys(audio=column, label=label)
    else:
        task = TextKeys(min(_LONGEST, positions), text=column, label=label)
    entry = ExpertEntry(
        name=name.lstrip("_.-")[:_LONGEST_NAME] or "expert",
        title=_title(path),
        model=f"./{path.relative_to(folder).as_posix()}",
        splits=splits,
        task=task,
    )
    return entry, missing


def _distinct(name: str, taken: Sequence[str]) -> str:
    """Return a name that a recipe takes beside these: no two are alike but for their case, and none is `mean`."""
    known = {"mean", *(other.lower() for other in taken)}
    numbered = (f"{name}-{number}" for number in count(2))
    return next(one for one in chain([name], numbered) if one.lower() not in known)


def _positions(base: Path) -> int:
    """Return how many tokens the base has positions for."""
    with Checkpoint.open(base) as checkpoint:
        return int(checkpoint.config.get("max_position_embeddings") or _LONGEST)


def _title(path: Path) -> str:
    if (path / _ADAPTER).exists():
        return "an adapter of the base"
    with Checkpoint.open(path) as checkpoint:
        return f"{len(checkpoint.config.get('id2label') or {}) or 2} classes"


def _rows(folder: Path, expert: Path, names: Iterable[str]) -> str | None:
    """Return the file that holds an expert's rows of one split, relative to the folder."""
    places = (folder / "data" / expert.name, expert / "data", expert, folder / expert.name)
    for place in places:
        for name in names:
            for suffix in _SUFFIXES:
                path = place / f"{name}{suffix}"
                if path.is_file():
                    return path.relative_to(folder).as_posix()
    return None


def _columns(folder: Path, path: str, what: str, wanted: Sequence[str]) -> tuple[str, str, list[str]]:
    """Guess what columns of a file hold its texts, images or sounds and its labels; also return what there are."""
    from bmm.evaluation.tables import opened

    builder = {".csv": "csv", ".parquet": "parquet"}.get(Path(path).suffix, "json")
    try:
        with opened(SplitSource(path=builder, data_files=path), folder, path) as table:
            columns = list(table.column_names)
    except DataError:
        columns = []
    column = next((name for name in wanted if name in columns), what)
    label = next((name for name in _LABEL_COLUMNS if name in columns), "label")
    return column, label, columns
