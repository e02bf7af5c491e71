"""The panel of a merge's tasks, and what the experts themselves answer on it: for every stage that evaluates."""

from __future__ import annotations

import torch

from bmm.evaluation.metrics import Measured
from bmm.prediction import Panel
from bmm.stages.request import Request, Work
from bmm.stages.setup import Setup


def panel_of(work: Work, request: Request, setup: Setup) -> Panel:
    """Return the panel of the merge's tasks, with the rows that the first stage kept."""
    artefacts = {expert.name: work.read(request.inputs["experts"][expert.name]) for expert in setup.experts}
    return Panel(work, setup.experts, artefacts, setup.layout, request.settings["batch_size"])


def expert_predictions(setup: Setup, panel: Panel, split: str) -> dict[str, Measured]:
    """Return, for each task, what its own expert's answers are worth."""
    answers = expert_answers(setup, panel, split)
    return {task: panel.measured(task, split, found) for task, found in answers.items()}


def expert_answers(setup: Setup, panel: Panel, split: str) -> dict[str, torch.Tensor]:
    """Return, for each task, what its own expert answers."""
    found = {}
    with setup.weights() as weights:
        for index, expert in enumerate(setup.experts):

            def state(index: int = index) -> dict[str, torch.Tensor]:
                return {name: weights.expert(index, name) for name in weights.names()}

            answers = panel.logits(expert.model.digest, state, [expert.name], split, f"expert {expert.name}")
            found[expert.name] = answers[expert.name]
    return found
