"""lm-evaluation-harness at work: documents put into words, and a model in memory asked about them.

All that decides a score is the package's own code: `ConfigurableTask` renders, builds the requests, filters and
judges; `HFLM` tokenises and runs the model. Only the loop around them is ours instead of `simple_evaluate`'s, which
would render every prompt again for each of the many models that are measured, print bars, and keep no place for one's
own documents; the tests hold that the scores are the same.

What a task file brings is never run: `bmm.kinds.lm_eval_file` has checked its keys, and its Jinja templates, which
the package would render with all of Python in reach, are rendered in Jinja's sandbox. This module is imported only
where a task of the kind is read or asked, since the package is an extra.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from typing import Any

import jinja2
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from lm_eval import utils
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from bmm.errors import DataError, one_line
from bmm.evaluation.data import read_documents
from bmm.evaluation.tables import opened
from bmm.evaluation.tokens import quiet_transformers
from bmm.kinds.lm_eval import LmEvalRow, query_identity
from bmm.kinds.lm_eval_file import TaskFile
from bmm.kinds.settings import LmEval, SplitSource
from bmm.kinds.texts import folded

# Logits of a vocabulary are large: as many rows at a time as stay below this.
_LOGIT_BYTES = 512 * 2**20
# Documents that are asked about before the progress bar moves.
_PIECE = 256
_MISTAKES = (jinja2.TemplateError, AssertionError, LookupError, TypeError, ValueError, SyntaxError)


class _Documents(list[dict[str, Any]]):
    """Documents as the harness takes them: a list that knows its columns."""

    @property
    def features(self) -> dict[str, None]:
        return dict.fromkeys(self[0])


class _Splits(dict[str, _Documents]):
    """The splits of a task's file by name, read when they are asked for."""

    def __init__(self, file: TaskFile, where: str) -> None:
        super().__init__()
        self._file = file
        self._where = where

    def __missing__(self, split: str) -> _Documents:
        with opened(self._file.source(split), self._file.folder, f"{self._where} ({self._file.where})") as table:
            self[split] = _Documents(dict(row) for row in table)
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


class _Task(ConfigurableTask):  # type: ignore[misc]
    """A task whose documents are given to it; nothing is downloaded."""

    def __init__(
        self, definition: Mapping[str, Any], documents: _Documents, split: str, splits: Mapping[str, _Documents]
    ) -> None:
        self._given = documents
        self._splits = splits
        super().__init__(config={**deepcopy(dict(definition)), "task": "task", "test_split": split})

    def download(self, dataset_kwargs: Any = None, **_: Any) -> None:  # noqa: ARG002 - as the harness calls it
        self.dataset = self._splits

    def test_docs(self) -> _Documents:
        return self._given

    def fewshot_docs(self) -> Any:
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
    with _quiet(), _sandboxed():
        with _explained(spot, numbers[0], file):
            made = _Task(definition, _Documents(documents), source.split, _Splits(file, where))
            made.set_fewshot_seed(task.fewshot_seed)
            drawn = made.sampler = _Shots(made.sampler) if shots else _Shots(None)
        for number, doc in zip(numbers, documents, strict=True):
            with _explained(spot, number, file):
                context = made.fewshot_context(doc, num_fewshot=shots, gen_prefix=made.doc_to_prefix(doc))
                prompt, answer = made.right(doc, context)
                rows.append(LmEvalRow(doc, context, prompt, answer, made.query(doc), _identities(made, drawn.drawn)))
    return tuple(rows)


def _identities(task: _Task, shots: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """Return what the documents shown as examples are known by as rows."""
    found = set()
    for shot in shots:
        # Examples that the file itself lists may have other columns than the data, and be no rows.
        with suppress(*_MISTAKES):
            found.add(query_identity(task.query(shot)))
    return tuple(sorted(found))


class Harness:
    """A language model as the harness asks it.

    Args:
        module: a causal language model of transformers; its weights may come and go.
        tokenizer: with an end-of-text token.
        max_length: tokens that the model reads at most.
        batch_size: requests in one forward pass.
        task: the expert's name, for messages.
    """

    def __init__(self, module: Any, tokenizer: Any, max_length: int, batch_size: int, task: str) -> None:
        self._task = task
        with _quiet(), quiet_transformers():
            self._model = _Model(module, tokenizer, max_length, batch_size, task)

    def tokens(self, prompt: str, answer: str) -> tuple[list[int], int]:
        """Return a prompt with its answer as tokens, and the place of the answer's first one.

        As in the harness, spaces at the prompt's end are the answer's, and where there is no prompt a special token
        stands for it.
        """
        model = self._model
        if prompt:
            tokens, start = model.tok_encode(prompt + answer), len(model.tok_encode(prompt.rstrip()))
        else:
            tokens, start = model.tok_encode(answer, add_special_tokens=False), 1
            if tokens and tokens[0] != model.prefix_token_id:
                tokens = [model.prefix_token_id, *tokens]
        cut = max(0, len(tokens) - model.max_length)
        return tokens[cut:], max(1, start - cut)

    def measure(self, rows: Sequence[LmEvalRow], asked: Mapping[str, Any], bar: Any = None) -> Tensor:
        """Return what the model's answers are worth: each row's figure and its weight, (rows, 2) float64.

        Args:
            rows: documents put into words.
            asked: `definition`, `metric` and `filter` of the task.
            bar: advanced by the rows that are done.

        Raises:
            DataError: a row that the model cannot be asked about.
        """
        result = torch.zeros(len(rows), 2, dtype=torch.float64)
        documents = _Documents(dict(row.doc) for row in rows)
        # Examples are in the words already.
        definition = {**asked["definition"], "num_fewshot": 0}
        with torch.inference_mode(), _quiet(), quiet_transformers(), _sandboxed():
            task = _Task(definition, documents, "test", {})
            for start in range(0, len(rows), _PIECE):
                places = range(start, min(start + _PIECE, len(rows)))
                instances = [self._requests(task, documents[place], rows[place], place) for place in places]
                self._answer(task, [one for some in instances for one in some])
                for place, own in zip(places, instances, strict=True):
                    answers = [one.filtered_resps[asked["filter"]] for one in own]
                    with _judged(self._task, rows[place].excerpt):
                        found = task.process_results(documents[place], answers)[asked["metric"]]
                        result[place] = torch.tensor(found if isinstance(found, tuple) else (found, 1.0))
                if bar is not None:
                    bar.advance(len(places))
        return result

    def _requests(self, task: _Task, doc: dict[str, Any], row: LmEvalRow, place: int) -> list[Any]:
        made = task.construct_requests(doc, row.context, metadata=("task", place, 1))
        return made if isinstance(made, list) else [made]

    def _answer(self, task: _Task, instances: list[Any]) -> None:
        if task.OUTPUT_TYPE == "generate_until":
            self._model.check_room(instances)
        answers = getattr(self._model, instances[0].request_type)(instances, disable_tqdm=True)
        for instance, answer in zip(instances, answers, strict=True):
            instance.resps.append(answer)
        task._instances = instances
        with _judged(self._task, instances[0].args[0]):
            task.apply_filters()


class _Model(HFLM):  # type: ignore[misc]
    """The harness's model of transformers, around one that is in memory."""

    def __init__(self, module: Any, tokenizer: Any, max_length: int, batch_size: int, task: str) -> None:
        super().__init__(
            pretrained=module, tokenizer=tokenizer, max_length=max_length, batch_size=batch_size, backend="causal"
        )
        self._expert = task
        self._most = batch_size

    def check_room(self, instances: Sequence[Any]) -> None:
        """Refuse answers for which the model has no room."""
        settings = instances[0].args[1]
        names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
        longest = next((settings[name] for name in names if settings.get(name) is not None), self.max_gen_toks)
        if longest >= self.max_length:
            raise DataError(
                f"{self._expert}: answers of {longest} tokens leave no room for a prompt in {self.max_length} tokens; "
                "lower generation_kwargs.max_gen_toks in the task's file, or raise task.max_length"
            )

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:  # noqa: ARG002 - bars are ours
        for texts, context, continuation in requests:
            if not context or not 0 < len(continuation) <= self.max_length:
                text = " ".join(part for part in texts or () if part)[-60:]
                raise DataError(
                    f"{self._expert}: a choice or text has to be of 1 to {self.max_length} tokens, which the end of "
                    f"{text!r} is not; change the row or raise task.max_length"
                )
        longest = max((len(context) + len(continuation) for _, context, continuation in requests), default=1)
        row = min(longest, self.max_length) * self.model.get_input_embeddings().num_embeddings * 4
        self.batch_size_per_gpu = max(1, min(self._most, _LOGIT_BYTES // row))
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)


@contextmanager
def _sandboxed() -> Iterator[None]:
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
def _quiet() -> Iterator[None]:
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
    except _MISTAKES as error:
        raise DataError(
            f"{spot}: row {number} cannot be put into words as {file.where} says: {one_line(error)}; correct the file "
            "or the row"
        ) from error


@contextmanager
def _judged(task: str, text: str) -> Iterator[None]:
    """Say of answers that a filter or metric does not take which they are."""
    try:
        yield
    except _MISTAKES as error:
        raise DataError(
            f"{task}: the filters or metrics of the lm-eval task do not take the answers, from that to {text[-60:]!r} "
            f"on: {one_line(error)}; correct the task's file"
        ) from error
