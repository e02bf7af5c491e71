"""Texts answered by an encoder-decoder (T5, BART): the whole model is merged, head and all.

A row's answer is what the decoder is shown while Grams are collected and likelihoods measured; for exact match it
writes its own. Rows, metrics and the shape of answers are those of `bmm.kinds.causal_lm`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from bmm.checkpoint.architecture import Architecture
from bmm.errors import CheckpointError, DataError
from bmm.evaluation.data import Split, read_columns
from bmm.evaluation.model import Prepared, TaskModel
from bmm.evaluation.tokens import TokenisedRows, load_tokenizer, quiet_transformers
from bmm.kinds.causal_lm import LANGUAGE_METRICS, CausalLMKind, CausalRow
from bmm.kinds.settings import Seq2SeqLM, SplitSource
from bmm.kinds.texts import check_texts, folded, probe_tokens

_NOTHING = -100
"""Where there is no token of an answer, in transformers' words."""


@dataclass(frozen=True)
class PairedTokens(TokenisedRows):
    """Tokens of prompts, and of each one's answer up to its end."""

    answers: tuple[tuple[int, ...], ...] = ()

    def labels(self, start: int, count: int, other: int) -> Tensor:
        """Return the answers of a batch as `order` has it, `(rows, tokens)`, of another length than `other`.

        By its length it is known to which of the two texts a token belongs.
        """
        rows = [self.answers[row] for row in self.order[start : start + count]]
        width = max(map(len, rows))
        width += width == other
        return torch.tensor([[*row, *[_NOTHING] * (width - len(row))] for row in rows])


class Seq2SeqLMKind(CausalLMKind):
    """`AutoModelForSeq2SeqLM` with a tokenizer."""

    name = "seq2seq-lm"
    architecture = Architecture("AutoModelForSeq2SeqLM", "encoder-decoder", whole=True)
    metrics = LANGUAGE_METRICS

    @override
    def load_split(self, source: SplitSource, task: Any, labels: Sequence[str], folder: Path, where: str) -> Split:
        """Read one split: prompts and answers, checked."""
        assert isinstance(task, Seq2SeqLM)  # noqa: S101 - of this kind
        columns = read_columns(source, {"prompt": task.prompt, "answer": task.answer}, folder, where)
        for key in ("prompt", "answer"):
            check_texts(columns, key)
        pairs = zip(columns.values["prompt"], columns.values["answer"], strict=True)
        return Split(where, tuple(CausalRow(prompt, answer) for prompt, answer in pairs))

    @override
    def build(
        self, config: Mapping[str, Any], folder: Path, reading: Mapping[str, Any], batch_size: int, task: str
    ) -> TaskModel:
        """Build an encoder-decoder with its tokenizer; prompts and answers are cut, each at its own length."""
        module = self._module(config, task)
        reader = Seq2SeqReader(folder, reading, module, task)
        return EncoderDecoder(task, module, batch_size, reader, reading)

    @override
    def bare(self, config: Mapping[str, Any], task: str) -> TaskModel:
        """Build an encoder-decoder."""
        return EncoderDecoder(task, self._module(config, task), 1, None, {})

    @override
    def probe(self, model: TaskModel) -> dict[str, Tensor]:
        """Return a few tokens for either part, of lengths that tell them apart."""
        tokens = probe_tokens()
        return {**tokens, "decoder_input_ids": tokens["input_ids"][:, :-1]}


class Seq2SeqReader:
    """Makes tokens of prompts and of answers.

    Args:
        folder: where the tokenizer's files are.
        reading: the task's `max_length` and `max_answer_length`.
        module: the model.
        task: the expert's name, for messages.

    Raises:
        CheckpointError: the folder has no tokenizer, or one without a padding token.
    """

    def __init__(self, folder: Path, reading: Mapping[str, Any], module: Any, task: str) -> None:
        self.tokenizer = load_tokenizer(folder)
        self._folder = folder
        self._lengths = reading["max_length"], reading["max_answer_length"]
        self._module = module
        self._task = task

    def prepare(self, rows: Sequence[CausalRow]) -> PairedTokens:
        """Return the rows as tokens.

        Raises:
            DataError: a prompt or an answer without tokens, or with more than the model has positions for.
            CheckpointError: the tokenizer has tokens that the model does not.
        """
        longest, longest_answer = self._lengths
        with quiet_transformers():
            prompts = [self.tokenizer(row.prompt, truncation=True, max_length=longest)["input_ids"] for row in rows]
            answers = [
                self.tokenizer(text_target=row.answer, truncation=True, max_length=longest_answer)["input_ids"]
                for row in rows
            ]
        for row, *pair in zip(rows, prompts, answers, strict=True):
            if not all(pair):
                raise DataError(
                    f"{self._task}: the tokenizer in {self._folder} makes no token of the prompt or the answer of the "
                    f"row {row.excerpt[:60]!r}; remove the row"
                )
        most = max((len(tokens) for tokens in (*prompts, *answers)), default=0)
        positions = getattr(self._module.config, "max_position_embeddings", None)
        if positions is not None and most > positions:
            raise DataError(
                f"{self._task}: a row has {most} tokens, but the model has {positions} positions; set task.max_length "
                f"and task.max_answer_length to at most {positions}"
            )
        vocabulary = self._module.get_input_embeddings().num_embeddings
        largest = max((max(tokens) for tokens in (*prompts, *answers)), default=0)
        if largest >= vocabulary:
            raise CheckpointError(
                f"{self._task}: the tokenizer in {self._folder} gives the token {largest}, but the model has "
                f"only {vocabulary} tokens; use the tokenizer that the model was trained with"
            )
        columns = {"input_ids": prompts, "attention_mask": [[1] * len(tokens) for tokens in prompts]}
        padding = {"input_ids": int(self.tokenizer.pad_token_id), "attention_mask": 0}
        return PairedTokens(columns, padding, "right", tuple(map(tuple, answers)))


class EncoderDecoder(TaskModel):
    """An encoder-decoder that says how likely answers are, or writes them."""

    def __init__(
        self, task: str, module: Any, batch_size: int, reader: Seq2SeqReader | None, asked: Mapping[str, Any]
    ) -> None:
        super().__init__(task, module, "", batch_size, reader)
        self._asked = asked

    @override
    def batches(self, prepared: Prepared) -> Iterator[dict[str, Tensor]]:
        """Yield batches with what the decoder reads: the answers, one place later."""
        for batch, labels in self._with_labels(prepared):
            shifted = self.module.prepare_decoder_input_ids_from_labels(labels)
            yield {**batch, "decoder_input_ids": shifted, "decoder_attention_mask": (labels != _NOTHING).long()}

    def _with_labels(self, prepared: Prepared) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        assert isinstance(prepared, PairedTokens)  # noqa: S101 - of this kind's own reader
        done = 0
        for batch in prepared.batches(self.batch_size):
            count, width = batch["input_ids"].shape
            yield batch, prepared.labels(done, count, width)
            done += count

    @override
    def logits(self, prepared: Prepared, bar: Any = None) -> Tensor:
        """Return each answer's log-likelihood and number of tokens, (rows, 2); or whether it is met, (rows, 1).

        Which of the two is the metric's to say. float64, in the order the rows were given.
        """
        self.require_weights()
        exact = self._asked.get("metric") == "exact-match"
        result = torch.zeros(len(prepared), 1 if exact else 2, dtype=torch.float64)
        done = 0
        with torch.inference_mode(), quiet_transformers():
            for batch, labels in self._with_labels(prepared):
                rows = list(prepared.order[done : done + len(labels)])
                done += len(rows)
                result[rows] = self._met(batch, labels) if exact else self._likelihoods(batch, labels)
                if bar is not None:
                    bar.advance(len(rows))
        if not torch.isfinite(result).all():
            raise FloatingPointError(f"the likelihoods of {self.task} are not finite")
        return result

    def _likelihoods(self, batch: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        shifted = self.module.prepare_decoder_input_ids_from_labels(labels)
        counts = labels != _NOTHING
        logs = self.module(**batch, decoder_input_ids=shifted, return_dict=True).logits.float().log_softmax(-1)
        found = logs.gather(-1, labels.clamp(min=0)[..., None])[..., 0].double()
        return torch.stack([(found * counts).sum(1), counts.sum(1).double()], dim=1)

    def _met(self, batch: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        assert isinstance(self.reader, Seq2SeqReader)  # noqa: S101 - built with it
        tokenizer = self.reader.tokenizer
        made = self.module.generate(
            **batch, do_sample=False, num_beams=1, use_cache=True, max_new_tokens=self._asked["max_new_tokens"]
        )
        meant = labels.masked_fill(labels == _NOTHING, tokenizer.pad_token_id)
        said, wanted = (
            [folded(text) for text in tokenizer.batch_decode(ids, skip_special_tokens=True)] for ids in (made, meant)
        )
        return torch.tensor([[float(one == other)] for one, other in zip(said, wanted, strict=True)]).double()
