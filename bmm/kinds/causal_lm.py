"""Causal language modelling: running text, or prompts and their answers; the whole model is merged, head and all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from typing_extensions import override

from bmm.checkpoint.architecture import Architecture
from bmm.checkpoint.reader import Checkpoint
from bmm.digest import canonical_json, digest_text
from bmm.errors import CheckpointError, DataError
from bmm.evaluation.data import Split, read_columns
from bmm.evaluation.model import Prepared, TaskModel, build_module
from bmm.evaluation.scores import Metric, Statistics, ratio, share, share_score
from bmm.evaluation.tokens import TokenisedRows, load_tokenizer, quiet_transformers
from bmm.kinds.interface import Kind
from bmm.kinds.settings import CausalLM, SplitSource
from bmm.kinds.texts import check_texts, folded, probe_tokens

# Logits of a vocabulary are large: as many rows at a time as stay below this.
_LOGIT_BYTES = 512 * 2**20


@dataclass(frozen=True)
class CausalRow:
    """One example: a text to be continued (empty for running text), and what comes then."""

    prompt: str
    answer: str

    @property
    def label(self) -> str:
        """What comes then."""
        return self.answer

    @cached_property
    def identity(self) -> str:
        """SHA-256 of the prompt, or of the text where there is none, white space folded."""
        return digest_text(canonical_json([folded(self.prompt) or None, None if self.prompt else folded(self.answer)]))

    @property
    def excerpt(self) -> str:
        """The beginning of the row, white space folded."""
        return folded(self.prompt or self.answer) or ""

    def document(self) -> dict[str, Any]:
        """Return the row as plain JSON values."""
        return {"prompt": self.prompt, "answer": self.answer}


@dataclass(frozen=True)
class ScoredTokens(TokenisedRows):
    """Tokens of rows, and for each row the place of the first one that counts."""

    starts: tuple[int, ...] = ()


def _log_likelihood(answers: ArrayLike, _: Sequence[str]) -> Statistics:
    """Log-likelihood in nats, and number of tokens, (rows, 2)."""
    return np.asarray(answers, dtype=np.float64)


def _nll(sums: Statistics) -> Any:
    """The negative log-likelihood of a token, in nats."""
    return -ratio(sums[..., 0], sums[..., 1])


def _likelihood(sums: Statistics) -> Any:
    """`exp(−NLL)` of a token, between 0 and 1: one over the perplexity."""
    return np.exp(-_nll(sums)) * (sums[..., 1] > 0)


def _exact_match(answers: ArrayLike, _: Sequence[str]) -> Statistics:
    return share(np.asarray(answers, dtype=np.float64)[:, 0])


LANGUAGE_METRICS = {
    "likelihood": Metric("likelihood", _log_likelihood, _likelihood, {"nll": _nll}),
    "exact-match": Metric("exact-match", _exact_match, share_score),
}


class CausalLMKind(Kind):
    """`AutoModelForCausalLM` with a tokenizer."""

    name = "causal-lm"
    architecture = Architecture("AutoModelForCausalLM", "language model", whole=True)
    metrics = LANGUAGE_METRICS
    classes = False

    @override
    def labels(self, checkpoint: Checkpoint, task: Any) -> tuple[str, ...]:
        """Return no names."""
        return ()

    @override
    def load_split(self, source: SplitSource, task: CausalLM, labels: Sequence[str], folder: Path, where: str) -> Split:
        """Read one split: texts, or prompts and answers, checked."""
        wanted = {"text": task.text} if task.prompt is None else {"prompt": task.prompt, "answer": task.answer}
        columns = read_columns(source, wanted, folder, where)
        for key in wanted:
            check_texts(columns, key)
        if task.prompt is None:
            return Split(where, tuple(CausalRow("", text) for text in columns.values["text"]))
        pairs = zip(columns.values["prompt"], columns.values["answer"], strict=True)
        return Split(where, tuple(CausalRow(prompt, answer) for prompt, answer in pairs))

    @override
    def row(self, value: dict[str, Any]) -> CausalRow:
        """Make a row of its document."""
        return CausalRow(prompt=value["prompt"], answer=value["answer"])

    @override
    def build(
        self, config: Mapping[str, Any], folder: Path, reading: Mapping[str, Any], batch_size: int, task: str
    ) -> TaskModel:
        """Build a language model with its tokenizer; texts are cut at `max_length` tokens."""
        module = self._module(config, task)
        reader = CausalReader(folder, reading["max_length"], module, task)
        return LanguageModel(task, module, batch_size, reader, reading)

    @override
    def bare(self, config: Mapping[str, Any], task: str) -> TaskModel:
        """Build a language model."""
        return LanguageModel(task, self._module(config, task), 1, None, {})

    @override
    def probe(self, model: TaskModel) -> dict[str, Tensor]:
        """Return a few tokens."""
        return probe_tokens()

    def _module(self, config: Mapping[str, Any], task: str) -> Any:
        module = build_module(config, self.architecture, task)
        # Whole rows are read at once, layer by layer too, and keys of earlier tokens would only take memory.
        module.config.use_cache = False
        return module


class CausalReader:
    """Makes tokens of prompts and answers as they stand next to each other.

    Args:
        folder: where the tokenizer's files are.
        max_length: tokens a row; longer texts are cut at their end, longer prompts at their beginning.
        module: the language model.
        task: the expert's name, for messages.

    Raises:
        CheckpointError: the folder has no tokenizer.
    """

    def __init__(self, folder: Path, max_length: int, module: Any, task: str) -> None:
        self.tokenizer = load_tokenizer(folder, padding=False)
        self._folder = folder
        self._max_length = max_length
        self._module = module
        self._task = task

    @property
    def pad(self) -> int:
        """A token that stands where the attention mask says that there is none."""
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return int(next(token for token in known if token is not None))

    def prepare(self, rows: Sequence[CausalRow]) -> ScoredTokens:
        """Return the rows as tokens.

        Raises:
            DataError: a row with nothing to predict, or with more tokens than the model has positions for.
            CheckpointError: the tokenizer has tokens that the model does not.
        """
        ids, starts = [], []
        with quiet_transformers():
            for row in rows:
                tokens, start = self._tokens(row)
                if start >= len(tokens):
                    raise DataError(
                        f"{self._task}: the tokenizer in {self._folder} makes no token to be predicted of the text "
                        f"{row.excerpt[:60]!r}; remove the row or raise task.max_length"
                    )
                ids.append(tokens)
                starts.append(start)
        positions = getattr(self._module.config, "max_position_embeddings", None)
        longest = max((len(tokens) for tokens in ids), default=0)
        if positions is not None and longest > positions:
            raise DataError(
                f"{self._task}: a row has {longest} tokens, but the model has {positions} positions; "
                f"set task.max_length to at most {positions}"
            )
        vocabulary = self._module.get_input_embeddings().num_embeddings
        largest = max((max(tokens) for tokens in ids), default=0)
        if largest >= vocabulary:
            raise CheckpointError(
                f"{self._task}: the tokenizer in {self._folder} gives the token {largest}, but the model has "
                f"only {vocabulary} tokens; use the tokenizer that the model was trained with"
            )
        columns = {"input_ids": ids, "attention_mask": [[1] * len(tokens) for tokens in ids]}
        return ScoredTokens(columns, {"input_ids": self.pad, "attention_mask": 0}, "right", tuple(starts))

    def _tokens(self, row: CausalRow) -> tuple[list[int], int]:
        """Return a row's tokens, and the place of the first that is predicted."""
        if not row.prompt:
            tokens = self.tokenizer(row.answer, truncation=True, max_length=self._max_length)["input_ids"]
            return list(tokens), 1
        prompt = self.tokenizer(row.prompt)["input_ids"]
        answer = self.tokenizer(row.answer, add_special_tokens=False)["input_ids"][: self._max_length - 1]
        kept = prompt[max(0, len(prompt) + len(answer) - self._max_length) :]
        return [*kept, *answer], max(1, len(kept))


class LanguageModel(TaskModel):
    """A language model that says how likely rows are, or goes on from their prompts."""

    def __init__(
        self, task: str, module: Any, batch_size: int, reader: CausalReader | None, asked: Mapping[str, Any]
    ) -> None:
        super().__init__(task, module, "", batch_size, reader)
        self._asked = asked

    @override
    def logits(self, prepared: Prepared, bar: Any = None) -> Tensor:
        """Return each row's log-likelihood and number of tokens, (rows, 2); or whether its answer is met, (rows, 1).

        Which of the two is the metric's to say. float64, in the order the rows were given.
        """
        self.require_weights()
        assert isinstance(prepared, ScoredTokens)  # noqa: S101 - of this kind's own reader
        exact = self._asked.get("metric") == "exact-match"
        result = torch.zeros(len(prepared), 1 if exact else 2, dtype=torch.float64)
        with torch.inference_mode(), quiet_transformers():
            for rows, answers in self._generated(prepared) if exact else self._likelihoods(prepared):
                result[rows] = answers
                if bar is not None:
                    bar.advance(len(rows))
        if not torch.isfinite(result).all():
            raise FloatingPointError(f"the likelihoods of {self.task} are not finite")
        return result

    def _likelihoods(self, prepared: ScoredTokens) -> Iterator[tuple[list[int], Tensor]]:
        widest = max(prepared.lengths, default=1) * self.module.get_input_embeddings().num_embeddings * 4
        size = max(1, min(self.batch_size, _LOGIT_BYTES // widest))
        done = 0
        for batch in prepared.batches(size):
            rows = list(prepared.order[done : done + len(batch["input_ids"])])
            done += len(rows)
            tokens = batch["input_ids"][:, 1:]
            logs = self.module(**batch, return_dict=True).logits[:, :-1].float().log_softmax(-1)
            found = logs.gather(-1, tokens[..., None])[..., 0].double()
            places = torch.arange(1, tokens.shape[1] + 1)
            counts = batch["attention_mask"][:, 1:].bool() & (
                places >= torch.tensor([prepared.starts[row] for row in rows])[:, None]
            )
            yield rows, torch.stack([(found * counts).sum(1), counts.sum(1).double()], dim=1)

    def _generated(self, prepared: ScoredTokens) -> Iterator[tuple[list[int], Tensor]]:
        assert isinstance(self.reader, CausalReader)  # noqa: S101 - built with it
        tokenizer, pad = self.reader.tokenizer, self.reader.pad
        order = sorted(range(len(prepared)), key=lambda row: (-prepared.starts[row], row))
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            width = prepared.starts[rows[0]]
            tokens = torch.full((len(rows), width), pad, dtype=torch.int64)
            mask = torch.zeros_like(tokens)
            for place, row in enumerate(rows):
                length = prepared.starts[row]
                tokens[place, width - length :] = torch.tensor(prepared.columns["input_ids"][row][:length])
                mask[place, width - length :] = 1
            made = self.module.generate(
                input_ids=tokens,
                attention_mask=mask,
                do_sample=False,
                num_beams=1,
                use_cache=True,
                max_new_tokens=self._asked["max_new_tokens"],
                pad_token_id=pad,
                eos_token_id=tokenizer.eos_token_id,
            )[:, width:]
            right = []
            for row, found in zip(rows, made, strict=True):
                wanted = prepared.columns["input_ids"][row][prepared.starts[row] :]
                said, meant = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (found, wanted))
                stop = self._asked.get("stop")
                if stop:
                    said, meant = (text.lstrip().partition(stop)[0] for text in (said, meant))
                right.append([float(folded(said) == folded(meant))])
            yield rows, torch.tensor(right, dtype=torch.float64)
