"""The anchor alone: a merge without regression, each tensor merged when it is written.

Nothing is kept between the experts' files and the output's but the tensors at work: no float32 copy of the anchor, no
second model in the store. What is merged how is the anchor methods' (`bmm.anchors`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from pydantic import TypeAdapter

from bmm.anchors.interface import Sources
from bmm.anchors.pieces import merge_tensor
from bmm.anchors.registry import build
from bmm.anchors.settings import AnchorSettings
from bmm.progress import Bar, progress
from bmm.sources import Model
from bmm.stages.anchor import checkpoint_reader
from bmm.stages.request import Request
from bmm.stages.setup import Setup
from bmm.weights import ExpertWeights


class AnchorAlone:
    """Gives every shared parameter merged by the anchor's method, by canonical name; from any thread."""

    def __init__(self, method: Any, weights: ExpertWeights, dtypes: Mapping[str, torch.dtype], bar: Bar) -> None:
        self._method = method
        self._weights = weights
        self._dtypes = dtypes
        self._bar = bar
        self._entries: dict[str, dict[str, Any]] = {}

    def __call__(self, name: str) -> torch.Tensor:
        """Return one parameter in the dtype in which it is published.

        Raises:
            CheckpointError: a tensor holds NaN or infinities.
        """
        tensor, treatment = merge_tensor(self._method, name, self._weights, self._dtypes[name])
        self._entries[name] = {
            "parameter": name,
            "shape": list(tensor.shape),
            "treatment": treatment,
            **dict.fromkeys(("module", "lambda", "gamma", "condition")),
        }
        self._bar.advance()
        return tensor

    def coverage(self) -> list[dict[str, Any]]:
        """Return how every parameter that was given came about."""
        return [self._entries[name] for name in sorted(self._entries)]


@contextmanager
def anchor_alone(request: Request, setup: Setup, dtypes: Mapping[str, torch.dtype]) -> Iterator[AnchorAlone]:
    """Yield what merges by the request's anchor, base and experts open for the length of the block."""
    settings: AnchorSettings = TypeAdapter(AnchorSettings).validate_python(_said(request))
    with ExitStack() as stack:
        weights = stack.enter_context(setup.weights())
        explicit = Model(**request.where["anchor"]) if request.where["anchor"] else None
        read = checkpoint_reader(stack, setup, explicit, "the anchor checkpoint") if explicit else None
        method = build(settings, Sources(checkpoint=read))
        method.prepare(weights)
        bar = stack.enter_context(progress(f"merging by {settings.method}", len(weights.names())))
        yield AnchorAlone(method, weights, dtypes, bar)


def _said(request: Request) -> dict[str, Any]:
    explicit = request.where["anchor"]
    return {**request.settings["anchor"], **({"path": explicit["source"]} if explicit else {})}
