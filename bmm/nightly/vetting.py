"""Whether an expert can be merged at all: its weights and rows read once, beside the base alone.

What is read here is kept as the merge's own first stages keep it, so a good expert costs nothing twice.
"""

from __future__ import annotations

from dataclasses import replace

from bmm.errors import ModelAwayError, OutputError, UserError
from bmm.nightly.resolved import Resolved
from bmm.pipeline import Execute, run_stages
from bmm.progress import progress
from bmm.store import Store

_STAGES = ("experts", "task-vectors")


def broken_experts(resolved: Resolved, store: Store, execute: Execute) -> dict[str, str]:
    """Return the experts that cannot be merged, each with what is wrong: a shape, a number that is none, a row.

    Raises:
        UserError: something else than an expert is at fault, the disk say.
    """
    broken = {}
    with progress("looking at the experts", len(resolved.inputs.experts)) as bar:
        for expert, source in zip(resolved.inputs.experts, resolved.recipe.experts, strict=True):
            alone = resolved.recipe.model_copy(update={"experts": (source,)})
            inputs = replace(resolved.inputs, experts=(expert,), grams={})
            try:
                run_stages(alone, inputs, store, execute, _STAGES)
            except (ModelAwayError, OutputError):
                raise
            except UserError as error:
                broken[expert.name] = str(error)
            bar.advance()
    return broken
