"""Stage 2, task vectors: every weight read once, refused if it is not finite, each difference measured."""

from __future__ import annotations

import math
from typing import Any

import torch

from bmm.progress import progress
from bmm.stages.request import Request, Work
from bmm.stages.setup import setup_of
from bmm.store import Draft

_BLOCK = 2**22


def task_vectors(work: Work, request: Request) -> dict[str, Any]:
    """Read every weight once: refuse what is not finite, and measure each expert's task vector.

    The task vectors themselves are differences of files that are there already, so only their norms are kept.

    Raises:
        CheckpointError: a tensor has NaN or infinite entries; it is named.
    """
    setup = setup_of(work, request)
    references = {}
    with setup.weights() as weights, progress("task vectors", len(setup.experts) * len(weights.names())) as bar:
        for index, expert in enumerate(setup.experts):

            def make(draft: Draft, index: int = index) -> None:
                norms = {}
                weights.check_head_finite(index)
                for name in weights.names():
                    weights.check_base_finite(name)
                    weights.check_finite(index, name)
                    if (base := weights.base(name)).is_floating_point():
                        norm, base_norm = _norms(weights.expert(index, name), base)
                        norms[name] = {"norm": norm, "base_norm": base_norm}
                    bar.advance()
                draft.write_json("norms.json", norms)

            inputs = {
                "base": setup.base.digest,
                "expert": expert.model.digest,
                "parameters": list(weights.names()),
            }
            references[expert.name] = work.obtain("task-vectors", inputs, make).to_json()
    return {"experts": references}


def _norms(expert: torch.Tensor, base: torch.Tensor) -> tuple[float, float]:
    """Return the norms of a task vector and of the base's tensor, in float64; of a table only a block at a time."""
    moved = stayed = 0.0
    for new, old in zip(*(torch.split(tensor.reshape(-1), _BLOCK) for tensor in (expert, base)), strict=True):
        start = old.double()
        moved += float((new.double() - start).square().sum())
        stayed += float(start.square().sum())
    return math.sqrt(moved), math.sqrt(stayed)
