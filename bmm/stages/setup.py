"""What every stage after the first starts from: base, experts, layout and linear maps, opened and checked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from bmm.checkpoint.layout import Layout
from bmm.checkpoint.reader import Checkpoint
from bmm.modules.linear import LinearMap
from bmm.sources import Expert, Model
from bmm.stages.request import Request, Work
from bmm.weights import ExpertWeights


@dataclass(frozen=True)
class Setup:
    """Base, experts and layout of a merge, as the first stage left them."""

    base: Model
    experts: tuple[Expert, ...]
    layout: Layout
    maps: tuple[LinearMap, ...]
    embeddings: frozenset[str]

    @property
    def regressed(self) -> tuple[LinearMap, ...]:
        """The linear maps whose weights are shared by base and experts."""
        shared = {parameter.name for parameter in self.layout.shared}
        return tuple(map_ for map_ in self.maps if map_.weight in shared)

    @property
    def matrices(self) -> tuple[LinearMap, ...]:
        """The regressed maps that methods of merging have a rule for: all but convolutions, which they average."""
        shapes = {parameter.name: parameter.shape for parameter in self.layout.shared}
        return tuple(map_ for map_ in self.regressed if len(shapes[map_.weight]) == 2 or map_.index is not None)

    @contextmanager
    def weights(self) -> Iterator[ExpertWeights]:
        """Open base and experts, checked against their digests, for the length of the block."""
        with ExitStack() as stack:
            base = stack.enter_context(self.base.open())
            yield ExpertWeights(base, open_all(stack, self.experts), self.layout, self.matrices)


def setup_of(work: Work, request: Request) -> Setup:
    """Read the layout that the request refers to and the models it locates."""
    layout = work.read(request.inputs["layout"])
    modules = layout.read_json("modules.json")
    return Setup(
        base=Model(**request.where["base"]),
        experts=tuple(Expert.from_json(value) for value in request.where["experts"]),
        layout=Layout.from_json(layout.read_json("layout.json")),
        maps=tuple(LinearMap.from_json(value) for value in modules["maps"]),
        embeddings=frozenset(modules["embeddings"]),
    )


def open_all(stack: ExitStack, experts: Sequence[Expert]) -> dict[str, Checkpoint]:
    """Open every expert's checkpoint on `stack`, checked against its digest, by the expert's name."""
    return {expert.name: stack.enter_context(expert.model.open()) for expert in experts}
