"""A task of lm-evaluation-harness over documents that are given to it, and such documents put into words.

The package's own `ConfigurableTask` does it; a model is asked in `bmm.kinds.lm_eval_harness`. What a task file brings
is never run: `bmm.kinds.lm_eval_file` has checked its keys, and its Jinja templates, which the package would render
with all of Python in reach, are rendered in Jinja's sandbox. This module is imported only where a task of the kind is
read or asked, since the package is an extra.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from lm_eval import utils
from lm_eval.api.task import ConfigurableTask

from bmm.errors import DataError, one_line
from bmm.evaluation.data import read_documents
from bmm.evaluation.tables import opened
from bmm.kinds.lm_eval import LmEvalRow, query_identity
from bmm.kinds.lm_eval_file import TaskFile
from bmm.kinds.settings import LmEval, SplitSource
from bmm.kinds.texts import folded

MISTAKES = (jinja2.TemplateError, AssertionError, LookupError, TypeError, ValueError, SyntaxError)
"""What its templates and metrics raise for a file or documents that do not fit them."""


class Documents(list[dict[str, Any]]):
    """Documents as the harness takes them: a list that knows its columns."""

    @property
    def features(self) -> dict[str, None]:
        """The columns' names, as the harness asks for them."""
        return dict.fromkeys(self[0])


class _Splits(dict[str, Documents]):
    """The splits of a task's file by name, read when they are asked for."""

    def __init__(self, file: TaskFile, where: str) -> None:
        super().__init__()
        self._file = file
        self._where = where

    def __missing__(self, split: str) -> Documents:
        with opened(self._file.source(split), self._file.folder, f"{self._where} ({self._file.where})") as table:
            self[split] = Documents(dict(row) for row in table)
        return self[split]


class _Shots:
    """A sampler of the harness that remembers what it has drawn."""

    def __init__(self, sampler: Any) -> None:
        self._sampler = sampler
        self.drawn: list[dict[str, Any]] = []

    def sample(self, *given: Any, **named: Any) -> list[dict[str, Any]]:
        self.drawn = list(self._sampler.sample(*given, **named))
        return self.drawn

    def set_rnd(self, seed: int) -> None:
        self._sampler.set_rnd(seed)


class HarnessTask(ConfigurableTask):  # type: ignore[misc]
    """A task whose documents are given to it; nothing is downloaded."""

    def __init__(
        self, definition: Mapping[str, Any], documents: Documents, split: str, splits: Mapping[str, Documents]
    ) -> None:
        self._given = documents
        self._splits = splits
        super().__init__(config={**deepcopy(dict(definition)), "task": "task", "test_split": split})

    def download(self, dataset_kwargs: Any = None, **_: Any) -> None:  # noqa: ARG002 - as the harness calls it
        """Take the splits that were given."""
        self.dataset = self._splits

    def test_docs(self) -> Documents:
        """Return the documents that were given."""
        return self._given

    def fewshot_docs(self) -> Any:
        """Return where examples are drawn from, if any are shown."""
        return super().fewshot_docs() if self.config.num_fewshot else None

    def query(self, doc: dict[str, Any]) -> tuple[str, ...]:
        """Return what a document asks, and its choices; white space folded."""
        text = self.doc_to_text(doc)
        asked = [text if isinstance(text, str) else ""]
        asked += self.doc_to_choice(doc) if self.config.doc_to_choice else []
        if not any(asked):
            asked = [str(self.doc_to_target(doc))]
        return tuple(folded(str(one)) or "" for one in asked)

    def right(self, doc: dict[str, Any], context: str | list[str]) -> tuple[str, str]:
        """Return the context of the right answer, and the answer as it goes on from there."""
        gold = self.doc_to_text(doc) if self.multiple_input else self.doc_to_target(doc)
        requests = self.construct_requests(doc, context, metadata=("task", 0, 1))
        gold = gold[0] if isinstance(gold, list) else gold
        if self.OUTPUT_TYPE == "multiple_choice":
            choices = self.doc_to_choice(doc)
            place = choices.index(gold) if isinstance(gold, str) else gold
            if not 0 <= place < len(choices):
                raise ValueError(f"the right answer is number {place}, counted from 0, of {len(choices)} choices")
            prompt, answer = requests[place].args[:2]
            return prompt, answer
        if self.OUTPUT_TYPE == "generate_until":
            gold = self.doc_to_choice(doc)[gold] if self.config.doc_to_choice else gold
            return str(context), f"{self.config.target_delimiter}{gold}"
        *prompts, answer = requests.args
        return "".join(prompts), answer


def worded(file: TaskFile, task: LmEval, source: SplitSource, where: str) -> tuple[LmEvalRow, ...]:
    """Return the documents of one split, put into words as the harness does.

    Args:
        file: the task.
        task: the recipe's settings.
        source: which split, and how much of it.
        where: expert and split; begins every message.

    Raises:
        DataError: files that cannot be read, or a document that a template or the harness does not take.
    """
    data = file.source(source.split).model_copy(update={"rows": source.rows, "seed": source.seed, "skip": source.skip})
    spot, numbers, documents = read_documents(data, file.folder, where)
    definition = file.asked(task)["definition"]
    shots = file.shots(task)
    rows = []
    with quiet(), sandboxed():
        with _explained(spot, numbers[0], file):
            made = HarnessTask(definition, Documents(documents), source.split, _Splits(file, where))
            made.set_fewshot_seed(task.fewshot_seed)
            drawn = made.sampler = _Shots(made.sampler) if shots else _Shots(None)
        for number, doc in zip(numbers, documents, strict=True):
            with _explained(spot, number, file):
                context = made.fewshot_context(doc, num_fewshot=shots, gen_prefix=made.doc_to_prefix(doc))
                prompt, answer = made.right(doc, context)
                rows.append(LmEvalRow(doc, context, prompt, answer, made.query(doc), _identities(made, drawn.drawn)))
    return tuple(rows)


def _identities(task: HarnessTask, shots: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """Return what the documents shown as examples are known by as rows."""
    found = set()
    for shot in shots:
        # Examples that the file itself lists may have other columns than the data, and be no rows.
        with suppress(*MISTAKES):
            found.add(query_identity(task.query(shot)))
    return tuple(sorted(found))


@contextmanager
def sandboxed() -> Iterator[None]:
    """Render the harness's templates where they reach nothing but their document."""
    plain = utils.env
    safe = ImmutableSandboxedEnvironment(undefined=plain.undefined, keep_trailing_newline=plain.keep_trailing_newline)
    safe.filters.update(plain.filters)
    utils.env = safe
    try:
        yield
    finally:
        utils.env = plain


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the harness from logging: what went wrong reaches the user as one sentence."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _explained(spot: str, number: int, file: TaskFile) -> Iterator[None]:
    """Say of what a template or the harness does not take where it stands."""
    try:
        yield
    except MISTAKES as error:
        raise DataError(
            f"{spot}: row {number} cannot be put into words as {file.where} says: {one_line(error)}; correct the file "
            "or the row"
        ) from error
