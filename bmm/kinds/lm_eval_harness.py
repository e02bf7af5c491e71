"""lm-evaluation-harness at work: a model in memory asked about documents.

All that decides a score is the package's own code: its task renders, builds the requests, filters and judges
(`bmm.kinds.lm_eval_task`); `HFLM` tokenises and runs the model. Only the loop around them is ours instead of
`simple_evaluate`'s, which would render every prompt again for each of the many models that are measured, print bars,
and keep no place for one's own documents; the tests hold that the scores are the same. This module is imported only
where a task of the kind is read or asked, since the package is an extra.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from bmm.errors import DataError, one_line
from bmm.evaluation.tokens import quiet_transformers
from bmm.kinds.lm_eval import LmEvalRow
from bmm.kinds.lm_eval_task import MISTAKES, Documents, HarnessTask, quiet, sandboxed

# Logits of a vocabulary are large: as many rows at a time as stay below this.
_LOGIT_BYTES = 512 * 2**20
# Documents that are asked about before the progress bar moves.
_PIECE = 256


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
        with quiet(), quiet_transformers():
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
        documents = Documents(dict(row.doc) for row in rows)
        # Examples are in the words already.
        definition = {**asked["definition"], "num_fewshot": 0}
        with torch.inference_mode(), quiet(), quiet_transformers(), sandboxed():
            task = HarnessTask(definition, documents, "test", {})
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

    def _requests(self, task: HarnessTask, doc: dict[str, Any], row: LmEvalRow, place: int) -> list[Any]:
        made = task.construct_requests(doc, row.context, metadata=("task", place, 1))
        return made if isinstance(made, list) else [made]

    def _answer(self, task: HarnessTask, instances: list[Any]) -> None:
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
def _judged(task: str, text: str) -> Iterator[None]:
    """Say of answers that a filter or metric does not take which they are."""
    try:
        yield
    except MISTAKES as error:
        raise DataError(
            f"{task}: the filters or metrics of the lm-eval task do not take the answers, from that to {text[-60:]!r} "
            f"on: {one_line(error)}; correct the task's file"
        ) from error
