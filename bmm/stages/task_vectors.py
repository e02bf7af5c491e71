"""Stage 2, task vectors: every weight read once, refused if it is not finite, each difference measured."""

from __future__ import annotations

from typing import Any

from bmm.progress import progress
from bmm.stages.request import Request, Work
from bmm.stages.setup import setup_of
from bmm.store import Draft


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
                    base = weights.base(name)
                    if base.is_floating_point():
                        difference = weights.expert(index, name).double() - base.double()
                        norms[name] = {"norm": float(difference.norm()), "base_norm": float(base.double().norm())}
                    bar.advance()
                draft.write_json("norms.json", norms)

            inputs = {
                "base": setup.base.digest,
                "expert": expert.model.digest,
                "parameters": list(weights.names()),
            }
            references[expert.name] = work.obtain("task-vectors", inputs, make).to_json()
    return {"experts": references}
