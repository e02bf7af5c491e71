"""Tables as `datasets` reads them from what a recipe names, and the local files behind them.

Lives here: everything that knows the `datasets` library. Does not live here: what the columns mean
(`bmm.evaluation.data`).

`datasets` caches what it read under a fingerprint of path, size and time; here every read gets a cache of its
own that is thrown away, so that a changed file is never served from an old cache and no table stays in the
user's home. (Files fetched from a hub stay in the hub's own cache, which goes by content.)
"""

from __future__ import annotations

import glob
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bmm.errors import DataError, one_line
from bmm.hub import hub_id
from bmm.kinds.settings import SplitSource

FOLDERS = ("imagefolder", "audiofolder")
"""Builders whose rows are files, each in a folder that is named after its class."""
BUILDERS = ("json", "csv", "parquet", "text", *FOLDERS)
_SOUNDS = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".au", ".caf", ".w64", ".rf64")
_SAVED_DATASET = "dataset_info.json"
_SAVED_DATASETS = "dataset_dict.json"


@contextmanager
def opened(source: SplitSource, folder: Path, spot: str) -> Iterator[Any]:
    """Hold the whole split open as a `datasets.Dataset`; what is needed must be copied out inside the block.

    Args:
        source: what to read; its `rows` and `seed` are left to the caller.
        folder: what relative paths are taken from.
        spot: begins every message: expert, split and file.

    Raises:
        DataError: nothing there, nothing in it, or not readable as what it is said to be.
    """
    with tempfile.TemporaryDirectory(prefix="bmm-datasets-") as cache, _quiet_datasets():
        yield _open(source, folder, Path(cache), spot)


def _open(source: SplitSource, folder: Path, cache: Path, spot: str) -> Any:
    """Return the whole split as a `datasets.Dataset`."""
    import datasets

    if source.path in BUILDERS:
        files = data_files(source, folder, spot)
        if all(path.stat().st_size == 0 for path in files):
            raise DataError(f"{spot}: the file is empty; name one that has rows")
        if source.path == "audiofolder":
            return _sound_folder(files, spot)
        return _build(source, files, cache, spot)
    local = saved_folder(source, folder, spot)
    try:
        if local is not None:
            saved = datasets.load_from_disk(str(local))
            if isinstance(saved, datasets.DatasetDict):
                if source.split not in saved:
                    raise DataError(f"{spot}: there is no split '{source.split}' (there are: {', '.join(saved)})")
                return saved[source.split]
            return saved
        return datasets.load_dataset(
            source.path,
            name=source.name,
            data_files=source.data_files,
            split=source.split,
            revision=source.revision,
            cache_dir=str(cache),
        )
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{spot}: the data set cannot be loaded: {_reason(error)}") from error


def _build(source: SplitSource, files: Sequence[Path], cache: Path, spot: str) -> Any:
    """Read local files with one of the packaged builders."""
    import datasets

    # Without these, the texts "None", "null" and "NA" of a CSV file would be read as missing, and the names of folders
    # would be labels only where there is more than one.
    options = {"csv": {"keep_default_na": False}, "imagefolder": {"drop_labels": False}}.get(source.path, {})

    def build(some: Sequence[Path], number: int) -> Any:
        return datasets.load_dataset(
            source.path,
            name=source.name,
            data_files=[glob.escape(str(path)) for path in some],
            split=source.split,
            cache_dir=str(cache / str(number)),
            **options,
        )

    try:
        return build(files, 0)
    except Exception as error:
        if isinstance(error, StopIteration) or "corresponds to no data" in str(error):
            raise DataError(f"{spot}: the file has no rows; name one that has some") from None
        if isinstance(error, ValueError) and str(error).startswith(("Unknown split", "Unrecognized instruction")):
            raise DataError(f"{spot}: {_reason(error)} Files without named splits are 'train'") from None
        culprits = ", ".join(str(path) for path in files)
        for number, path in enumerate(files if len(files) > 1 and source.path not in FOLDERS else [], 1):
            try:
                build([path], number)
            except Exception as alone:
                culprits, error = str(path), alone
                break
        raise DataError(
            f"{spot}: {culprits} cannot be read as {source.path}: {_reason(error)}; correct the file or `path`"
        ) from error


def _sound_folder(files: Sequence[Path], spot: str) -> Any:
    """Return the paths of sound files, each labelled with its folder's name; `datasets` itself would want a decoder."""
    import datasets

    sounds = [path for path in files if path.suffix.lower() in _SOUNDS]
    if not sounds:
        raise DataError(f"{spot}: there is no sound file ({', '.join(_SOUNDS)}); correct `data_files`")
    labels = [path.parent.name for path in sounds]
    return datasets.Dataset.from_dict({"audio": [str(path) for path in sounds], "label": labels})


def data_files(source: SplitSource, folder: Path, spot: str) -> list[Path]:
    """Return the existing files that `data_files` names, absolute, patterns expanded, each once.

    Raises:
        DataError: none is named, one does not exist, is a folder or is an address on the network.
    """
    named = [source.data_files] if isinstance(source.data_files, str) else list(source.data_files or [])
    if not named:
        raise DataError(f"{spot}: the {source.path} builder needs files; name them in `data_files`")
    found: dict[Path, None] = {}
    for name in named:
        if "://" in name:
            raise DataError(f"{spot}: {name} is not a local file; download it and name it by its path")
        path = Path(folder).resolve() / Path(name).expanduser()
        if path.is_dir() and source.path in FOLDERS:
            found.update(dict.fromkeys(sorted(match for match in path.rglob("*") if match.is_file())))
            continue
        if path.is_dir():
            raise DataError(f"{spot}: {path} is a folder; name the files in it, such as {name.rstrip('/')}/*")
        matches = [path]
        if not path.exists():
            pattern = str(path) if Path(name).expanduser().is_absolute() else _within(Path(folder).resolve(), name)
            matches = [Path(match) for match in sorted(glob.glob(pattern, recursive=True)) if Path(match).is_file()]
            if not matches:
                raise DataError(f"{spot}: there is no file {path}; correct `data_files`")
        found.update(dict.fromkeys(matches))
    return list(found)


def encoded_files(table: Any, columns: Iterable[str]) -> Any:
    """Return a table whose columns of images and sounds hold mappings of `bytes` and `path`: nothing is decoded."""
    import datasets

    for name in columns:
        for feature in (datasets.Image, datasets.Audio):
            if isinstance(table.features[name], feature):
                table = table.cast_column(name, feature(decode=False))
    return table


def named_files(source: SplitSource, column: str, folder: Path, spot: str) -> list[Path]:
    """Return the existing files that a column of paths names, each once, in the order of the rows.

    Without a column of that name, or with one that holds something else than texts, there are none.
    """
    if source.path in ("text", *FOLDERS):
        return []
    if source.path == "parquet" and not _names_files(data_files(source, folder, spot)[0], column):
        return []
    with opened(source, folder, spot) as table:
        feature = table.features.get(column)
        values = list(table[column]) if _holds_names(feature) else []
    # As `datasets` writes an image that is not in the table: a mapping with its path and no bytes.
    names = (value.get("path") if isinstance(value, dict) and not value.get("bytes") else value for value in values)
    paths = (Path(folder).resolve() / name for name in names if isinstance(name, str))
    return list(dict.fromkeys(path for path in paths if path.is_file()))


def _holds_names(feature: Any) -> bool:
    """Say whether a column holds texts, or mappings with a path."""
    return getattr(feature, "dtype", None) in ("string", "large_string") or (
        isinstance(feature, dict) and "path" in feature
    )


def _names_files(file: Path, column: str) -> bool:
    """Say whether a Parquet file's column holds texts, without reading its rows."""
    import pyarrow
    import pyarrow.parquet

    try:
        schema = pyarrow.parquet.read_schema(file)
    except (OSError, pyarrow.ArrowException):
        return False  # What is wrong with it is said where its rows are read.
    place = schema.get_field_index(column)
    return place >= 0 and str(schema.field(place).type) in ("string", "large_string")


def _within(folder: Path, pattern: str) -> str:
    """Return a pattern below a folder whose own name is taken literally."""
    return str(Path(glob.escape(str(folder))) / pattern)


def saved_folder(source: SplitSource, folder: Path, spot: str) -> Path | None:
    """Return the folder written by `save_to_disk` that the source names, or None for a hub id.

    Raises:
        DataError: it is neither.
    """
    path = Path(folder).resolve() / Path(source.path).expanduser()
    if (path / _SAVED_DATASET).is_file() or (path / _SAVED_DATASETS).is_file():
        return path
    if path.exists():
        raise DataError(
            f"{spot}: {path} is not a data set written by save_to_disk; set `path` to one of "
            f"{', '.join(BUILDERS)} and name the files in `data_files`"
        )
    # A bare word is either a builder that is not offered (one of them unpickles) or a misspelt one.
    hub = hub_id(source.path)
    if hub is None or hub.revision is not None:
        raise DataError(
            f"{spot}: `path` is '{source.path}', which is neither one of {', '.join(BUILDERS)}, nor an "
            "existing folder, nor a hub id such as owner/name"
        )
    return None


def shown(source: SplitSource) -> str:
    """Return what the user wrote for this source, short enough for a sentence."""
    if source.data_files is None:
        return source.path
    return source.data_files if isinstance(source.data_files, str) else ", ".join(source.data_files[:3])


def _reason(error: BaseException) -> str:
    """Return the innermost cause in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line(error)


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Keep `datasets` from printing bars and log lines; what went wrong reaches the user as one sentence."""
    import datasets
    from datasets.utils import logging
    from huggingface_hub import utils as hub

    level, bars, hub_bars = (
        logging.get_verbosity(),
        datasets.are_progress_bars_disabled(),
        hub.are_progress_bars_disabled(),
    )
    logging.set_verbosity(logging.CRITICAL)
    datasets.disable_progress_bars()
    hub.disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()
        if not hub_bars:
            hub.enable_progress_bars()
