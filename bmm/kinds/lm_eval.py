"""Tasks of lm-evaluation-harness (the package `lm-eval`): a task file of its format, and splits of its data.

How documents become prompts, how choices are compared, how answers are filtered and what counts as right is the
package's own doing, on the model in memory; `bmm.kinds.lm_eval_harness` is where it is run. A kind of its own, and not
a metric of `causal-lm`, because all of this stands in the task's file instead of in columns, and because a row is
more than a prompt and its answer: several choices, or several prompts.

The recipe names one file for all splits, since the file names its splits itself and a task is measured in one way. A
split's documents are put into words once, when rows are read: each row keeps its document, its prompt with the
examples before it, and the right continuation. So rows are known by their digests, examples are drawn once whatever
is merged and evaluated, and a calibration row, as for `causal-lm`, is a prompt and its answer as the model reads
them. What an answer is worth is one number a document (a metric of all documents at once, such as f1, could not be
resampled in pairs), so shares of the experts and intervals are those of every other kind.

Reading the file without running any of it is `bmm.kinds.lm_eval_file`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from typing_extensions import override

from bmm.digest import canonical_json, digest_text
from bmm.errors import CheckpointError, DataError
from bmm.evaluation.data import Split
from bmm.evaluation.model import Prepared
from bmm.evaluation.scores import Metric, Statistics, ratio, share_score
from bmm.kinds.causal_lm import CausalLMKind, CausalReader, LanguageModel, ScoredTokens
from bmm.kinds.lm_eval_file import TaskFile, require_package
from bmm.kinds.settings import LmEval, SplitSource

if TYPE_CHECKING:
    from bmm.kinds.lm_eval_harness import Harness


@dataclass(frozen=True)
class LmEvalRow:
    """One document of a task, put into words.

    Attributes:
        doc: the document as its file has it.
        context: what stands before the continuation, examples included; a list where choices differ in it.
        prompt: the context of the right answer.
        answer: the right answer, as it goes on from there.
        query: what the document asks, without examples, and the choices there are.
        shown: identities of the documents that are its examples.
    """

    doc: Mapping[str, Any]
    context: str | list[str]
    prompt: str
    answer: str
    query: tuple[str, ...]
    shown: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The right answer."""
        return self.answer

    @cached_property
    def identity(self) -> str:
        """SHA-256 of question and choices, white space folded."""
        return query_identity(self.query)

    @property
    def excerpt(self) -> str:
        """The question, or the first choice where there is none."""
        return next((text for text in self.query if text), "")

    def document(self) -> dict[str, Any]:
        """Return the row as plain JSON values."""
        return {
            "doc": dict(self.doc),
            "context": self.context,
            "prompt": self.prompt,
            "answer": self.answer,
            "query": list(self.query),
            "shown": list(self.shown),
        }


def query_identity(query: Sequence[str]) -> str:
    """Return the SHA-256 of a question and its choices."""
    return digest_text(canonical_json(list(query)))


@dataclass(frozen=True)
class Documents(ScoredTokens):
    """Rows as tokens, right answers behind their prompts, with the rows themselves."""

    rows: tuple[LmEvalRow, ...] = ()


def _two_columns(answers: ArrayLike, _: Sequence[str]) -> Statistics:
    """A figure and its weight, (rows, 2)."""
    return np.asarray(answers, dtype=np.float64)


def _likelihood(sums: Statistics) -> Any:
    """One over the perplexity: `exp` of the mean log-likelihood."""
    return np.exp(ratio(sums[..., 0], sums[..., 1])) * (sums[..., 1] > 0)


def _perplexity(sums: Statistics) -> Any:
    """The figure as the harness prints it, lower is better."""
    return np.exp(-ratio(sums[..., 0], sums[..., 1]))


_SHARES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match")
_PERPLEXITIES = ("perplexity", "word_perplexity", "byte_perplexity")


class LmEvalKind(CausalLMKind):
    """`AutoModelForCausalLM` with a tokenizer, asked by lm-evaluation-harness."""

    name = "lm-eval"
    # Higher has to be better, so of a perplexity its inverse is measured, and itself recorded beside it.
    metrics = {name: Metric(name, _two_columns, share_score) for name in _SHARES} | {
        name: Metric(f"1/{name}", _two_columns, _likelihood, {name: _perplexity}) for name in _PERPLEXITIES
    }

    @override
    def load_split(  # type: ignore[override]
        self, source: SplitSource, task: LmEval, labels: Sequence[str], folder: Path, where: str
    ) -> Split:
        """Read one split of a task's file, and put its documents into words."""
        require_package()
        from bmm.kinds.lm_eval_task import worded

        file = TaskFile.read((folder / Path(source.path).expanduser()).resolve())
        return Split(where, worded(file, task, source, where))

    @override
    def row(self, value: dict[str, Any]) -> LmEvalRow:  # type: ignore[override]
        """Make a row of its document."""
        return LmEvalRow(**{**value, "query": tuple(value["query"]), "shown": tuple(value["shown"])})

    @override
    def check_splits(self, where: str, splits: Mapping[str, Split]) -> None:
        """Refuse splits that share a row, and rows that are measured and shown with their answers in a prompt.

        Calibration rows may be examples, and validation rows those of test prompts: nothing is measured on them then.
        """
        super().check_splits(where, splits)
        for measured, readers in (("validation", ("calibration", "validation")), ("test", tuple(splits))):
            if measured not in splits:
                continue
            for reader in readers:
                shown = {one for row in (splits[reader].rows if reader in splits else ()) for one in row.shown}
                if found := next((row for row in splits[measured].rows if row.identity in shown), None):
                    raise DataError(
                        f'{where}: prompts of the split {reader} show the {measured} row "{found.excerpt[:60]}" with '
                        "its answer as an example; set fewshot_split in the task's file to a split that is not measured"
                    )

    @override
    def build(
        self, config: Mapping[str, Any], folder: Path, reading: Mapping[str, Any], batch_size: int, task: str
    ) -> LanguageModel:
        """Build a language model with its tokenizer; prompts lose their beginning where `max_length` is too short."""
        require_package()
        module = self._module(config, task)
        return LmEvalModel(
            task, module, batch_size, LmEvalReader(folder, reading["max_length"], module, task, batch_size), reading
        )

    @override
    def bare(self, config: Mapping[str, Any], task: str) -> LanguageModel:
        """Build a language model."""
        return LmEvalModel(task, self._module(config, task), 1, None, {})


class LmEvalReader(CausalReader):
    """Makes tokens of a row as the harness does."""

    def __init__(self, folder: Path, max_length: int, module: Any, task: str, batch_size: int) -> None:
        super().__init__(folder, max_length, module, task)
        from bmm.kinds.lm_eval_harness import Harness

        if self.tokenizer.eos_token_id is None:
            raise CheckpointError(
                f"the tokenizer in {folder} has no end-of-text token, which lm-eval needs; set eos_token and save it"
            )
        positions = getattr(module.config, "max_position_embeddings", None)
        self._max_length = max_length if positions is None else min(max_length, positions)
        self.harness: Harness = Harness(module, self.tokenizer, self._max_length, batch_size, task)

    @override
    def prepare(self, rows: Sequence[LmEvalRow]) -> Documents:  # type: ignore[override]
        """Return the rows as tokens, and themselves."""
        tokens = super().prepare(rows)  # type: ignore[arg-type]
        return Documents(tokens.columns, tokens.padding, tokens.side, tokens.starts, tuple(rows))

    @override
    def _tokens(self, row: LmEvalRow) -> tuple[list[int], int]:  # type: ignore[override]
        return self.harness.tokens(row.prompt, row.answer)


class LmEvalModel(LanguageModel):
    """A language model that the harness asks."""

    @override
    def logits(self, prepared: Prepared, bar: Any = None) -> Tensor:
        """Return each row's figure and its weight, (rows, 2) float64, in the order the rows were given."""
        self.require_weights()
        assert isinstance(prepared, Documents)  # noqa: S101 - of this kind's own reader
        assert isinstance(self.reader, LmEvalReader)  # noqa: S101 - built with it
        found = self.reader.harness.measure(prepared.rows, self._asked, bar)
        if not torch.isfinite(found).all():
            raise FloatingPointError(f"the answers of {self.task} are not finite")
        return found
