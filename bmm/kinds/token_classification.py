"""Token classification: a class for each word of a row (named entities, parts of speech)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from typing_extensions import override

from bmm.checkpoint.architecture import Architecture
from bmm.digest import canonical_json, digest_text
from bmm.errors import CheckpointError, DataError
from bmm.evaluation.data import Split, read_columns
from bmm.evaluation.labels import label_ids
from bmm.evaluation.model import Prepared, TaskModel, build_module
from bmm.evaluation.scores import Metric, Statistics, ratio, share_score
from bmm.evaluation.tokens import TokenisedRows, quiet_transformers
from bmm.kinds.interface import Kind
from bmm.kinds.settings import SplitSource, TokenClassification
from bmm.kinds.texts import TextReader, folded, probe_tokens

_ENDED = "ESLU"
_BEGUN = "BSU"


@dataclass(frozen=True)
class WordsRow:
    """One example: words, and the class id of each."""

    words: tuple[str, ...]
    label: tuple[int, ...]

    @cached_property
    def identity(self) -> str:
        """SHA-256 of the words."""
        return digest_text(canonical_json([folded(word) for word in self.words]))

    @property
    def excerpt(self) -> str:
        """The words."""
        return " ".join(self.words)

    def document(self) -> dict[str, Any]:
        """Return the row as plain JSON values."""
        return {"words": list(self.words), "label": list(self.label)}


@dataclass(frozen=True)
class WordTokens(TokenisedRows):
    """Tokens of rows, and for each word of a row the place of its first token, None where it was cut off."""

    places: tuple[tuple[int | None, ...], ...] = ()


def spans(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Return the spans that tags mean: type, first word and the word behind the last.

    As CoNLL's own script reads them: a type that changes, or an `I` after an `O`, begins a span too. Prefixes are those
    of IOB2, BIOES and BILOU; a tag without one is the inside of its type.
    """
    found = set()
    start, last_prefix, last_type = 0, "O", ""
    for place, tag in enumerate([*tags, "O"]):
        prefix, dash, kind = tag.partition("-")
        if not dash and tag != "O":
            prefix, kind = "I", tag
        other = kind != last_type
        if last_prefix != "O" and (last_prefix in _ENDED or prefix == "O" or prefix in _BEGUN or other):
            found.add((last_type, start, place))
        if prefix != "O" and (last_prefix == "O" or last_prefix in _ENDED or prefix in _BEGUN or other):
            start = place
        last_prefix, last_type = prefix, kind
    return found


def _split(answers: ArrayLike, labels: Sequence[Sequence[int]]) -> list[tuple[list[int], list[int]]]:
    """Return predicted and true class ids of each row, of the words that were read."""
    scores = np.asarray(answers)
    ids, seen = scores[:, :-1].argmax(axis=1), scores[:, -1] > 0
    rows, start = [], 0
    for true in labels:
        words = [place for place in range(len(true)) if seen[start + place]]
        rows.append(([int(ids[start + place]) for place in words], [true[place] for place in words]))
        start += len(true)
    return rows


def _accuracy(answers: ArrayLike, labels: Sequence[Sequence[int]]) -> Statistics:
    """Right words, and words, (rows, 2)."""
    rows = _split(answers, labels)
    return np.array(
        [[sum(one == other for one, other in zip(*row, strict=True)), len(row[0])] for row in rows], dtype=np.float64
    )


def _span_f1(answers: ArrayLike, labels: Sequence[Sequence[int]], names: Sequence[str]) -> Statistics:
    """Spans that are right, that were predicted, and that there are, (rows, 3)."""
    counts = []
    for predicted, true in _split(answers, labels):
        found, wanted = (spans([names[index] for index in ids]) for ids in (predicted, true))
        counts.append([len(found & wanted), len(found), len(wanted)])
    return np.array(counts, dtype=np.float64)


def _span_f1_score(sums: Statistics) -> Any:
    return ratio(2 * sums[..., 0], sums[..., 1] + sums[..., 2])


class TokenClassificationKind(Kind):
    """`AutoModelForTokenClassification` with a tokenizer."""

    name = "token-classification"
    architecture = Architecture("AutoModelForTokenClassification", "token classifier")
    classes = False
    metrics = {  # noqa: RUF012 - a constant
        "span-f1": Metric("span-f1", partial(_span_f1, names=()), _span_f1_score),
        "accuracy": Metric("accuracy", _accuracy, share_score),
    }

    @override
    def metric(self, name: str, labels: Sequence[str]) -> Metric:
        """Return a metric that knows what the classes are called."""
        found = self.metrics[name]
        return replace(found, statistics=partial(_span_f1, names=labels)) if name == "span-f1" else found

    @override
    def load_split(
        self, source: SplitSource, task: TokenClassification, labels: Sequence[str], folder: Path, where: str
    ) -> Split:
        """Read one split: words and, for each, a class id."""
        columns = read_columns(source, {"words": task.words, "label": task.label}, folder, where)
        rows = []
        inner = getattr(columns.features["label"], "feature", None)
        for number, words, values in zip(
            columns.numbers, columns.values["words"], columns.values["label"], strict=True
        ):
            spot = f"{columns.spot}: row {number}"
            if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
                raise DataError(
                    f"{spot} has no list of words in column '{task.words}'; set task.words to the right one"
                )
            if not isinstance(values, list) or len(values) != len(words):
                raise DataError(f"{spot} does not have one label for each of its {len(words)} words; correct the row")
            ids = label_ids(
                values,
                labels,
                columns.spot,
                numbers=[number] * len(values),
                feature=getattr(inner, "names", None),
            )
            rows.append(WordsRow(tuple(words), tuple(ids)))
        return Split(where, tuple(rows))

    @override
    def row(self, value: dict[str, Any]) -> WordsRow:
        """Make a row of its document."""
        return WordsRow(words=tuple(value["words"]), label=tuple(value["label"]))

    @override
    def build(
        self, config: Mapping[str, Any], folder: Path, reading: Mapping[str, Any], batch_size: int, task: str
    ) -> TaskModel:
        """Build a classifier of words with its tokenizer; words behind `max_length` tokens are not read."""
        module = build_module(config, self.architecture, task)
        model = WordsModel(task, module, self.architecture.prefix(dict(config)), batch_size)
        model.reader = WordsReader(folder, reading["max_length"], module, model.encoder, task)
        return model

    @override
    def probe(self, model: TaskModel) -> dict[str, Tensor]:
        """Return a few tokens."""
        return probe_tokens()


class WordsReader(TextReader):
    """Makes tokens of words, and remembers where each word begins."""

    @override
    def prepare(self, rows: Sequence[Any]) -> WordTokens:
        """Return the rows as tokens, cut at `max_length`.

        Raises:
            DataError: a row becomes no tokens, or more than the model has positions for.
            CheckpointError: the tokenizer does not take words, or has tokens that the model does not.
        """
        try:
            with quiet_transformers():
                encoded = [
                    self.tokenizer(
                        list(row.words), is_split_into_words=True, truncation=True, max_length=self.max_length,
                        padding=False, return_attention_mask=True,
                    )
                    for row in rows
                ]  # fmt: skip
                first = [_first_tokens(one.word_ids(), len(row.words)) for one, row in zip(encoded, rows, strict=True)]
        except (AssertionError, ValueError) as error:
            raise CheckpointError(
                f"the tokenizer in {self.folder} does not take words ({' '.join(str(error).split())[:200]}); save it "
                "again with add_prefix_space=True"
            ) from error
        names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name not in self.refused()]
        columns = {name: [list(one[name]) for one in encoded] for name in names if all(name in one for one in encoded)}
        padding = {
            "input_ids": int(self.tokenizer.pad_token_id),
            "attention_mask": 0,
            "token_type_ids": int(self.tokenizer.pad_token_type_id),
        }
        tokens = WordTokens(columns, padding, self.side, tuple(first))
        self.check(tokens, [row.excerpt for row in rows])
        return tokens


def _first_tokens(words: Sequence[int | None], count: int) -> tuple[int | None, ...]:
    places: dict[int, int] = {}
    for place, word in enumerate(words):
        if word is not None:
            places.setdefault(word, place)
    return tuple(places.get(word) for word in range(count))


class WordsModel(TaskModel):
    """A classifier that answers for each word by what it says of the word's first token."""

    @override
    def logits(self, prepared: Prepared, bar: Any = None) -> Tensor:
        """Return each word's logits and, last, whether the word was read at all: (words of all rows, classes + 1)."""
        self.require_weights()
        assert isinstance(prepared, WordTokens)  # noqa: S101 - of this kind's own reader
        starts = np.cumsum([0, *(len(places) for places in prepared.places)])
        result = torch.zeros(int(starts[-1]), self.module.config.num_labels + 1, dtype=torch.float32)
        done = 0
        with torch.inference_mode():
            for batch in self.batches(prepared):
                logits = self.module(**batch, return_dict=True).logits.float()
                width = logits.shape[1]
                for place, row in enumerate(prepared.order[done : done + len(logits)]):
                    shift = width - prepared.lengths[row] if prepared.side == "left" else 0
                    for word, token in enumerate(prepared.places[row]):
                        if token is not None:
                            result[starts[row] + word, :-1] = logits[place, shift + token]
                            result[starts[row] + word, -1] = 1.0
                done += len(logits)
                if bar is not None:
                    bar.advance(len(logits))
        if not torch.isfinite(result).all():
            raise FloatingPointError(f"the logits of {self.task} are not finite")
        return result
