"""Task files of lm-evaluation-harness, read without running anything of them.

The harness's own reader imports Python wherever such a file says `!function`, fetches data sets and metrics from a
hub (metrics as code), and hands unknown generation settings to transformers, which would fetch code for one of them.
A recipe may come with a file that its user has not read, so here the file is read as plain YAML, every key has to be
one that is known to be harmless, and what is left over is refused with a sentence. The data are local files.

Lives here: which keys a file may have, which files are behind it, which of its metrics and filters is measured. Does
not live here: running the harness, sandboxed templates among it (`bmm.kinds.lm_eval_task`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from bmm.checkpoint.allowed import check_allowed
from bmm.errors import DataError, RecipeError
from bmm.evaluation.tables import data_files
from bmm.kinds.lm_eval_keys import ASKS, METRIC_KEYS, METRICS, check
from bmm.kinds.settings import LmEval, SplitSource


def require_package() -> None:
    """Refuse to go on without the harness.

    Raises:
        RecipeError: it is not installed.
    """
    if find_spec("lm_eval") is None or find_spec("accelerate") is None:
        raise RecipeError(
            "a task of the kind 'lm-eval' needs the package lm-eval; "
            "install it with `pip install 'bayesian-model-merging[lm-eval]'`"
        )


@dataclass(frozen=True)
class TaskFile:
    """A task of the harness, checked.

    Attributes:
        where: the file's path, for messages.
        folder: what the paths of its data are relative to.
        parts: the file, and those that it includes.
        config: what they say together, as JSON values.
    """

    where: str
    folder: Path
    parts: tuple[Path, ...]
    config: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> TaskFile:
        """Read a task's file, and those that it includes.

        Raises:
            DataError: a file is missing or no YAML, or says something that would run code or fetch something, or
                that is not known to be harmless.
        """
        parts: list[Path] = []
        config = _merged(path, parts)
        try:
            config = json.loads(json.dumps(config))
        except (TypeError, ValueError) as error:
            raise DataError(f"{path}: a value is none that JSON has ({error}); write it as a text") from None
        check(str(path), config)
        return cls(str(path), path.parent, tuple(parts), config)

    @property
    def output_type(self) -> str:
        """What is asked of a model."""
        return str(self.config.get("output_type", "generate_until"))

    def source(self, split: str) -> SplitSource:
        """Return what the data of one split are read from.

        Raises:
            DataError: the file has no such split.
        """
        files = self.config["dataset_kwargs"]["data_files"]
        named: Mapping[str, Any] = files if isinstance(files, dict) else {"train": files}
        if split not in named:
            raise DataError(
                f"{self.where}: there is no split '{split}' in dataset_kwargs.data_files (there are: "
                f"{', '.join(named)}); add it, or name another in the recipe's `split`"
            )
        return SplitSource(path=self.config["dataset_path"], data_files=named[split])

    def shots(self, task: LmEval) -> int:
        """Return how many examples stand before each prompt."""
        return int(task.num_fewshot if task.num_fewshot is not None else self.config.get("num_fewshot") or 0)

    def examples_split(self) -> str | None:
        """Return the split that examples are taken from; None where the file names none, or lists them itself."""
        config = self.config
        settings = config.get("fewshot_config") or {}
        named = settings.get("split") or config.get("fewshot_split")
        if named is None and "samples" not in settings:
            named = config.get("training_split") or config.get("validation_split")
        return None if named is None else str(named)

    def files(self, split: str, task: LmEval, where: str) -> list[Path]:
        """Return every file behind one split, in a fixed order: the task's, the data, and what examples come from.

        Raises:
            DataError: a file is missing, or no local one.
        """
        splits = [split]
        if self.shots(task) and (examples := self.examples_split()) is not None and examples != split:
            splits.append(examples)
        spot = f"{where} ({self.where})"
        found = [path for name in splits for path in data_files(self.source(name), self.folder, spot)]
        return [*self.parts, *found]

    def asked(self, task: LmEval) -> dict[str, Any]:
        """Return what of the file decides the answers, with the one metric and filter that are measured.

        Raises:
            DataError: the file has no such metric or filter, or no metric that can be measured.
        """
        metric, scores = self._metric(task.metric)
        name, steps = self._filter(task.filter)
        definition = {key: value for key, value in self.config.items() if key in ASKS and value is not None}
        definition |= {"output_type": self.output_type, "num_fewshot": self.shots(task), "metric_list": [scores]}
        if self.shots(task):
            examples = self.examples_split()
            if examples is None and "samples" not in (self.config.get("fewshot_config") or {}):
                raise DataError(
                    f"{self.where}: {self.shots(task)} examples are to stand before each prompt, but nothing says what "
                    "they are taken from; add 'fewshot_split'"
                )
            # Said outright, so that the harness shows no document as an example of itself.
            definition |= {} if examples is None else {"fewshot_split": examples}
        if steps is not None:
            definition["filter_list"] = [{"name": name, "filter": steps}]
        return {"definition": definition, "metric": metric, "filter": name}

    def _metric(self, wanted: str | None) -> tuple[str, dict[str, Any]]:
        usable = METRICS[self.output_type]
        given = self.config.get("metric_list") or [{"metric": name} for name in usable]
        entries = {entry["metric"]: entry for entry in given}
        both = [name for name in entries if name in usable]
        wanted = wanted or next(iter(both), "")
        if wanted not in both:
            raise DataError(
                f"{self.where}: the recipe's metric {'has to be' if both else 'would have to be'} one that the task's "
                f"metric_list names and that has a figure for each document "
                f"({', '.join(usable)} of {self.output_type}); "
                f"{'choose ' + ' or '.join(both) if both else 'add one to metric_list'}"
            )
        entry = dict(entries[wanted])
        if entry.pop("hf_evaluate", False):
            raise DataError(
                f"{self.where}: 'hf_evaluate' would fetch the metric {wanted} as code from a hub; remove the key"
            )
        if unknown := sorted(set(entry) - METRIC_KEYS):
            raise DataError(f"{self.where}: the metric {wanted} has the unknown key '{unknown[0]}'; remove it")
        if entry.get("aggregation", usable[wanted]) != usable[wanted]:
            raise DataError(
                f"{self.where}: the metric {wanted} is aggregated as '{entry['aggregation']}', but only "
                f"'{usable[wanted]}' can be resampled document by document; change 'aggregation'"
            )
        return wanted, {**entry, "aggregation": usable[wanted]}

    def _filter(self, wanted: str | None) -> tuple[str, list[dict[str, Any]] | None]:
        given = self.config.get("filter_list")
        if not given:
            if wanted not in (None, "none"):
                raise DataError(f"{self.where}: the task has no filter_list; leave out `filter` in the recipe")
            return "none", None
        filters = {entry["name"]: entry["filter"] for entry in given}
        name = next(iter(filters)) if wanted is None else wanted
        if name not in filters:
            raise DataError(
                f"{self.where}: there is no filter '{name}' in filter_list; set `filter` in the recipe to one of "
                f"{', '.join(filters)}"
            )
        return str(name), filters[name]


class _TagError(yaml.MarkedYAMLError):  # type: ignore[misc]
    """A value is to be made by Python."""


class _PlainLoader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML as PyYAML reads it safely; tags of one's own are refused with the line they stand in."""


def _refuse_tag(loader: Any, suffix: str, node: Any) -> Any:  # noqa: ARG001 - as PyYAML calls it
    raise _TagError(problem=node.tag, problem_mark=node.start_mark)


for _prefix in ("!", "tag:yaml.org,2002:python/"):
    _PlainLoader.add_multi_constructor(_prefix, _refuse_tag)


def _merged(path: Path, parts: list[Path]) -> dict[str, Any]:
    """Return what a file and those that it includes say, its own keys first; their paths go into `parts`."""
    check_allowed(path, "the lm-eval task file")
    if path in parts:
        raise DataError(f"{path} is included by itself; remove the 'include' that leads back to it")
    parts.append(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"there is no lm-eval task file {path}; correct the recipe's `file`, or 'include'") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the lm-eval task file {path} cannot be read: {error}") from None
    try:
        config = yaml.load(text, Loader=_PlainLoader)  # noqa: S506 - a SafeLoader
    except _TagError as error:
        raise DataError(
            f"{path}, line {error.problem_mark.line + 1}: '{error.problem}' names Python, and nothing that a task file "
            "brings is run; write it as a Jinja template, or prepare the data beforehand"
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(f"the lm-eval task file {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise DataError(
            f"the lm-eval task file {path} must be a mapping of keys such as task, dataset_path, doc_to_text"
        )
    included = config.pop("include", None) or []
    merged: dict[str, Any] = {}
    for name in included if isinstance(included, list) else [included]:
        merged |= _merged((path.parent / str(name)).resolve(), parts)
    return merged | config
