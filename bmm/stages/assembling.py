"""What the search stage and its workers assemble weights from: module groups, moments or Gram matrices, coverage.

Reads artefacts; the mathematics is `bmm.assembly` and `bmm.problems`.
"""

from __future__ import annotations

import math

import torch

from bmm.assembly import Assembler
from bmm.errors import CheckpointError
from bmm.grams.estimate import blend
from bmm.grams.store import GramReader
from bmm.prediction import StoredWeights
from bmm.problems import GramOf, Sums, module_wise, propagated
from bmm.regression.settings import RegressionSettings
from bmm.search.groups import ModulePlace, groups_of
from bmm.search.settings import Per
from bmm.stages.propagation import walk
from bmm.stages.request import Request, Work
from bmm.stages.setup import Setup
from bmm.weights import ExpertWeights


def check_coverage(setup: Setup, minimum: float) -> None:
    """Refuse a merge that would regress too small a share of the encoder's matrix weights (embeddings apart).

    Raises:
        CheckpointError: naming the largest matrix that would be missed.
    """
    regressed = {map_.weight for map_ in setup.regressed}
    matrices = {
        parameter.name: math.prod(parameter.shape)
        for parameter in setup.layout.shared
        if sum(size > 1 for size in parameter.shape) >= 2 and parameter.name not in setup.embeddings
    }
    reached = sum(size for name, size in matrices.items() if name in regressed)
    total = sum(matrices.values())
    if total == 0 or reached / total < minimum:
        missed = max(
            (name for name in matrices if name not in regressed), key=lambda name: matrices[name], default="none"
        )
        raise CheckpointError(
            f"only {reached} of {total} matrix weights of this architecture are linear maps that can be regressed "
            f"(largest missed: {missed}); lower coverage.minimum to merge the rest by the anchor alone"
        )


def module_groups(setup: Setup, per: Per) -> dict[str, str]:
    """Return each regressed map's module with the group that shares its hyperparameters."""
    return groups_of([ModulePlace(map_.module, map_.type, map_.layer) for map_ in setup.regressed], per)


def assembler_of(
    work: Work, request: Request, setup: Setup, weights: ExpertWeights, anchored: StoredWeights, *, keep: bool = True
) -> Assembler:
    """Return the assembler of the maps that the request of a search asks for; with `keep` every factor is held."""
    if request.settings["regression"]["mode"] == "propagated":
        walked = walk(work, request, setup, anchored)
        problems = propagated(setup.regressed, weights, walked.prior, walked.moments, keep=keep)
        return Assembler(problems, walked.prior, walked.lambdas, walked.solved)
    grams = gram_readers(work, request, setup)
    gram = summed_grams(work, request, setup)
    problems = module_wise(
        setup.regressed, weights, anchored, gram, lambda group: sum(reader.rows(group) for reader in grams), keep=keep
    )
    return Assembler(problems, anchored)


def summed_grams(work: Work, request: Request, setup: Setup) -> GramOf:
    """Return what gives an expert's Gram matrix as it is summed over tasks: blended and weighted."""
    grams = gram_readers(work, request, setup)
    settings = RegressionSettings.model_validate(request.settings["regression"])
    counts = settings.weights([expert.name for expert in setup.experts])
    names = [expert.name for expert in setup.experts]
    parts = gram_parts(work, request, setup)

    def gram(index: int, group: str, sums: Sums) -> torch.Tensor:
        rho, weighted = sums
        if rho is None:
            found = grams[index].gram(group)
        else:
            own, other = (readers[index].sum(group) for readers in parts)
            blended = blend(own, other, rho)
            found = blended.total / blended.rows
        return found * (counts[index] * dict(weighted).get(names[index], 1.0))

    return gram


def gram_readers(work: Work, request: Request, setup: Setup) -> list[GramReader]:
    """Return the readers of the experts' Gram matrices, in the experts' order."""
    return [GramReader(work.read(request.inputs["grams"][expert.name]).file("grams.zarr")) for expert in setup.experts]


def gram_parts(work: Work, request: Request, setup: Setup) -> tuple[list[GramReader], list[GramReader]]:
    """Return the readers of what hybrid Gram matrices are blended from, where the search is to blend them itself."""
    said = request.inputs.get("gram_parts")
    if said is None:
        return [], []
    own, other = (
        [GramReader(work.read(said[source][expert.name]).file("grams.zarr")) for expert in setup.experts]
        for source in ("activations", "task-vectors")
    )
    return own, other
