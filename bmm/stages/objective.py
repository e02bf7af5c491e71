"""What a setting is worth on the rows that steer the search: weights assembled, models run, gains compared.

Between assembly (`bmm.assembly`), the panel of tasks (`bmm.prediction`) and the objectives
(`bmm.evaluation.objectives`); the same in this process and in a worker.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing

import numpy as np
import torch

from bmm.assembly import Assembler
from bmm.errors import RecipeError
from bmm.evaluation.metrics import Measured
from bmm.evaluation.objectives import Reference, RowGains, gains, mean_variance, same_answers, value_of
from bmm.evaluation.racing import PARTS, verdict
from bmm.prediction import Panel, StoredWeights
from bmm.search.outcome import Outcome
from bmm.search.rows import GainsByTask
from bmm.search.setting import ANCHOR, Setting
from bmm.search.settings import SearchSettings
from bmm.stages.anchor import published_dtypes
from bmm.stages.panel import expert_answers, panel_of
from bmm.stages.request import Request, Work
from bmm.stages.setup import Setup
from bmm.stages.walking import Walking

DTYPES = {"base": None, "float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""The recipe's words for a dtype, in safetensors' words; None is each parameter's own dtype in the base."""
UNLABELLED = "unlabelled"


class Objective:
    """Measures settings; the experts' own answers, which it compares with, are taken from the store.

    Args:
        work: the way to the store.
        request: that of the search.
        setup: base and experts.
        groups: each regressed map's module group.
        anchored: gives the anchor's tensors, for all that is not regressed.

    Attributes:
        split: the rows that steer the search.
        experts: each task's metric of its expert; 1 where rows have no labels and the expert is the measure.
        noise: the objective's variance over draws of the rows, of a model as good as the experts; None for agreement,
            where the experts have none.

    Raises:
        RecipeError: the objective is not one of these tasks' kinds.
    """

    def __init__(
        self, work: Work, request: Request, setup: Setup, groups: Mapping[str, str], anchored: StoredWeights
    ) -> None:
        settings = SearchSettings.model_validate(request.settings["search"])
        self._groups = groups
        self._objective, self._racing = settings.objective, settings.racing
        self._rounds = request.settings["regression"].get("rounds", 1)
        self._panel: Panel = panel_of(work, request, setup)
        if self._objective != "share-of-expert":
            for task in self._panel.tasks:
                if not self._panel.has_classes(task):
                    raise RecipeError(
                        f"'search.objective': {self._objective} is for tasks whose answers are scores of classes, and "
                        f"{task} is of another kind; set it to share-of-expert"
                    )
        self._dtypes = published_dtypes(setup, DTYPES[request.settings["dtype"]])
        with setup.weights() as weights:
            self._rest = {name: anchored(name).to(self._dtypes[name]) for name in weights.names()}
        unlabelled = self._objective == "agreement" and self._panel.has(UNLABELLED)
        self.split = UNLABELLED if unlabelled else "validation"
        answers = expert_answers(setup, self._panel, self.split)
        measured = {task: self._measured(task, found, found) for task, found in answers.items()}
        self._references = {
            task: Reference(measured[task].score, found, None if unlabelled else self._panel.classes(task, self.split))
            for task, found in answers.items()
        }
        self.experts = {task: reference.score for task, reference in self._references.items()}
        self.noise: float | None = None
        if self._objective != "agreement":
            found = {task: self._gains(task, answers[task], measured[task]) for task in answers}
            # An expert without a single right row is told of where its share is first asked for.
            if all(self.experts.values()):
                self.noise = value_of(self._objective, measured, found, self._references)[1] or None

    def evaluate(
        self, assembler: Assembler | Walking, chosen: Mapping[str, Setting], rival: GainsByTask | None
    ) -> Outcome:
        """Run the model of one setting for each group; with a rival's gains it may stop before all rows are seen.

        Raises:
            FloatingPointError: a weight or an answer is not finite.
        """
        regressed: Mapping[str, torch.Tensor] = {}
        # From the second round on, what a map leans on is no longer the anchor.
        if self._rounds == 1 or any(setting != ANCHOR for setting in chosen.values()):
            regressed = assembler.trial({module: chosen[group] for module, group in self._groups.items()})
        state = {**self._rest, **{name: tensor.to(self._dtypes[name]) for name, tensor in regressed.items()}}
        rows = {task: self._panel.rows(task, self.split) for task in self._panel.tasks}
        seen: dict[str, list[int]] = {task: [] for task in rows}
        pieces: dict[str, list[torch.Tensor]] = {task: [] for task in rows}
        with closing(self._panel.answers_in_parts(state, self.split)) as parts:
            for turn, part in enumerate(parts, 1):
                for task, (indices, answers) in part.items():
                    seen[task] += indices
                    pieces[task].append(answers)
                if turn == PARTS or not self._racing or rival is None or not all(seen.values()):
                    continue
                answered = {task: torch.cat(found) for task, found in pieces.items()}
                stopped = self._stopped(answered, seen, rows, rival)
                if stopped is not None:
                    return stopped
        measured, found = {}, {}
        for task, order in seen.items():
            answers = torch.cat(pieces[task])
            answers = answers[torch.argsort(torch.tensor(order))] if len(pieces[task]) > 1 else answers
            measured[task] = self._measured(task, answers, self._references[task].answers)
            found[task] = self._gains(task, answers, measured[task])
        value, variance = value_of(self._objective, measured, found, self._references)
        whole = {task: one for task, one in found.items() if one is not None}
        tasks = {task: one.score for task, one in measured.items()}
        return Outcome(value, tasks, variance, 1.0, whole if len(whole) == len(found) else None)

    def _stopped(
        self,
        answered: Mapping[str, torch.Tensor],
        seen: Mapping[str, list[int]],
        rows: Mapping[str, int],
        rival: GainsByTask,
    ) -> Outcome | None:
        measured, found = {}, {}
        for task, answers in answered.items():
            reference = self._references[task]
            expert = None if reference.answers is None else reference.answers[seen[task]]
            measured[task] = self._measured(task, answers, expert, seen[task])
            gained = self._gains(task, answers, measured[task], seen[task])
            if gained is None:
                return None
            found[task] = gained
        lost = verdict(seen, found, rival)
        if lost is None:
            return None
        count = len(found)
        # Of the objective on all rows, as the rival's; and of what was guessed of those not seen.
        sampling = sum(mean_variance(one) * len(one) / rows[task] for task, one in found.items()) / count**2
        share = sum(len(one) for one in found.values()) / sum(rows.values())
        tasks = {task: one.score for task, one in measured.items()}
        whole = {task: np.full(rows[task], np.nan) for task in found}
        for task, gained in found.items():
            whole[task][seen[task]] = gained
        return Outcome(lost.objective, tasks, sampling + lost.variance, share, whole)

    def _measured(
        self, task: str, answers: torch.Tensor, expert: torch.Tensor | None, rows: list[int] | None = None
    ) -> Measured:
        if self.split == UNLABELLED and expert is not None:
            return same_answers(answers, expert)
        return self._panel.measured(task, self.split, answers, rows)

    def _gains(
        self, task: str, answers: torch.Tensor, measured: Measured, rows: list[int] | None = None
    ) -> RowGains | None:
        reference = self._references[task]
        if rows is not None:
            labels = None if reference.labels is None else [reference.labels[row] for row in rows]
            expert = None if reference.answers is None else reference.answers[rows]
            reference = Reference(reference.score, expert, labels)
        if self._objective == "share-of-expert" and not reference.score > 0:
            return None
        return gains(self._objective, answers, measured, reference)
