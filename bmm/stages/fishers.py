"""Every expert's diagonal Fisher information on its own calibration rows: an artefact each, made when asked for."""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import save_file

from bmm.anchors.settings import FisherSettings
from bmm.errors import RecipeError
from bmm.evaluation.data import Split
from bmm.evaluation.fisher import diagonal_fisher
from bmm.kinds.registry import kind_of
from bmm.kinds.settings import reading
from bmm.prediction import build_model, head_tensors, made_head, read_split
from bmm.progress import progress
from bmm.stages.request import Request, Work
from bmm.stages.setup import Setup
from bmm.store import Artefact, Draft, Reference


def fisher_artefacts(work: Work, request: Request, setup: Setup, settings: FisherSettings) -> list[Reference]:
    """Return the experts' `fisher` artefacts in order, one expert in memory at a time.

    An artefact holds float32 tensors by canonical name. It depends on that expert and its rows alone.

    Args:
        work: the way to the store.
        request: with the experts' rows among its inputs.
        setup: the merge.
        settings: which labels, and their seed.
    """
    names = [parameter.name for parameter in setup.layout.shared]
    with setup.weights() as weights:
        floating = [name for name in names if weights.base(name).is_floating_point()]
        references = []
        for expert in setup.experts:
            if not kind_of(expert.task["kind"]).classes:
                raise RecipeError(
                    f"'fisher' needs the classes of a classification, but the expert {expert.name} is of the kind "
                    f"{expert.task['kind']}; choose another anchor method, or leave fisher out of evaluation.compare"
                )
        for index, expert in enumerate(setup.experts):
            artefact = work.read(request.inputs["experts"][expert.name])
            split = read_split(artefact, "calibration")

            def make(draft: Draft, index: int = index, artefact: Artefact = artefact, split: Split = split) -> None:
                expert = setup.experts[index]
                with expert.model.open() as checkpoint:
                    model = build_model(checkpoint, expert, 1, setup.layout)
                    model.load_head(head_tensors(checkpoint, setup.layout, expert.name, artefact))
                model.load_encoder({name: weights.expert(index, name) for name in names})
                with progress(f"Fisher information of {expert.name}", len(split.rows)) as bar:
                    found = diagonal_fisher(
                        model, split.rows, floating, labels=settings.labels, seed=settings.seed, bar=bar
                    )
                tensors = {name: tensor.to(torch.float32) for name, tensor in found.items()}
                save_file(tensors, draft.path / "fisher.safetensors")

            inputs = {"expert": expert.model.digest, "calibration": split.digest, "parameters": floating}
            if (head := made_head(artefact)) is not None:
                inputs["head"] = head
            said: dict[str, Any] = {"reading": reading(expert.task), "labels": settings.labels}
            if settings.labels == "sampled":
                said["seed"] = settings.seed
            references.append(work.obtain("fisher", inputs, make, settings=said))
    return references
