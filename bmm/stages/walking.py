"""Weights of which each was solved on what the layers before it really give: a walk for every setting.

Where a search varies `λ` on the sums of one walk, a layer's inputs are those that this walk's layers gave; here each
setting has a walk of its own, which begins at the first layer whose strength no walk before it had (the store keeps
every layer under all that decides it: `bmm.stages.propagation`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from bmm.assembly import Assembler
from bmm.prediction import StoredWeights
from bmm.problems import propagated
from bmm.search.setting import ANCHOR, Setting
from bmm.stages.propagation import walk
from bmm.stages.request import Request, Work
from bmm.stages.setup import Setup
from bmm.weights import ExpertWeights


class Walking:
    """Assembles settings by walking.

    Args:
        work: the way to the store.
        request: that of the search.
        setup: base and experts.
        weights: theirs, open for as long as this is used.
        anchored: gives the anchor's tensors.
    """

    def __init__(
        self, work: Work, request: Request, setup: Setup, weights: ExpertWeights, anchored: StoredWeights
    ) -> None:
        self._work = work
        self._request = request
        self._setup = setup
        self._weights = weights
        self._anchored = anchored

    def at(self, settings: Mapping[str, Setting]) -> Assembler:
        """Return what has solved every map at its own setting; each has `γ = 1`."""
        strengths = {module: setting.lam for module, setting in settings.items()}
        found = walk(self._work, self._request, self._setup, self._anchored, strengths)
        problems = propagated(self._setup.regressed, self._weights, found.prior, found.moments, keep=False)
        return Assembler(problems, found.prior, found.lambdas, found.solved)

    def trial(self, settings: Mapping[str, Setting]) -> dict[str, torch.Tensor]:
        """Return every regressed parameter by canonical name, float32; none where all keep their anchor."""
        if all(setting == ANCHOR for setting in settings.values()):
            return {}
        return self.at(settings).trial(settings)
