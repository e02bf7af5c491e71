"""One share of a walk through the network: some tasks, wherever a worker has time for them.

What is asked of a share is a pure function of the request: moments of one group, after the units and groups before it
were solved as the store says. A worker keeps the share that it had last, with its experts'
activations where they are, and carries it on; a worker that has never seen it, or has fallen behind, catches up. So
a worker may die at any time, and no state is lost with it.

The walk itself is `bmm.regression.propagate`; who asks, sums and solves is `bmm.stages.walker`.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import safe_open
from torch import nn

from bmm.checkpoint.layout import dotted
from bmm.checkpoint.mapped import mapped
from bmm.cluster.settings import ClusterSettings
from bmm.evaluation.vocabulary import fill, joined, shifted
from bmm.memory import give_back
from bmm.modules.chain import Batch
from bmm.modules.linear import LinearMap
from bmm.modules.residence import Give
from bmm.modules.tokens import Sample
from bmm.prediction import StoredWeights, build_model, head_tensors, own_rows, read_split
from bmm.regression.held_out import is_held_out
from bmm.regression.moments import Moments
from bmm.regression.propagate import Walk
from bmm.regression.room import room_for_answers
from bmm.sizes import parse_bytes
from bmm.stages.request import Request, Work
from bmm.stages.setup import Setup, setup_of
from bmm.store import Artefact, Reference, Store
from bmm.threads import one_thread
from bmm.weights import ExpertWeights

WalkKind = TypeVar("WalkKind", bound=Walk)

SOLUTIONS = "solutions.safetensors"
PARTS: tuple[Literal["fit"], Literal["held-out"]] = ("fit", "held-out")


@dataclass(frozen=True)
class PartRequest:
    """What a worker is asked for; plain JSON values, so that it travels anywhere.

    Attributes:
        walk: digest of what decides the walk.
        request: the search stage's request.
        store: where the artefact store is.
        tasks: places of this share's tasks among the experts.
        before: the artefacts of the round before, from whose model this one starts.
        done: the artefacts of the units before, in order.
        unit: the unit in work.
        solved: the artefacts of its groups that are solved already, in order.
        group: the group whose moments are wanted.
        held_out: whether some rows are kept out of the solve.
    """

    walk: str
    request: Mapping[str, Any]
    store: str
    tasks: tuple[int, ...]
    before: tuple[Mapping[str, str], ...]
    done: tuple[Mapping[str, str], ...]
    unit: str
    solved: tuple[Mapping[str, str], ...]
    group: str
    held_out: bool


def part_moments(values: dict[str, Any]) -> list[tuple[Moments, ...]]:
    """Return the moments of one group for each task of a share, of the rows held out too if asked for."""
    names = ("tasks", "before", "done", "solved")
    request = PartRequest(**{**values, **{name: tuple(values[name]) for name in names}})
    with _lock, one_thread():
        try:
            return _part_of(request).moments(request)
        finally:
            for walk in tuple(_unwanted):
                _unwanted.discard(walk)
                _drop_walk(walk)


def open_walk(
    kind: type[WalkKind],
    work: Work,
    request: Request,
    setup: Setup,
    weights: ExpertWeights,
    prior: Give,
    tasks: Sequence[int],
    *,
    held_out: bool = False,
    room: int | None = None,
) -> WalkKind:
    """Return a walk of some tasks that stands at the network's beginning.

    Args:
        kind: the class of the walk.
        work: the way to the store.
        request: the search stage's.
        setup: the merge.
        weights: base and experts, open for as long as the walk lasts.
        prior: gives the weights of the model that it begins with.
        tasks: places of the tasks among the experts.
        held_out: whether some rows are kept out of the solve.
        room: bytes of the experts' answers that are kept while a layer is solved; without, all.
    """
    own = _OwnRows(setup)
    rows = work.read(request.inputs["experts"][setup.experts[0].name])
    merged, expert = (_encoder(setup, own, rows) for _ in range(2))
    apart: list[int] | None = None
    if held_out:
        parts = [[_batches(work, request, setup, task, own, part) for task in tasks] for part in PARTS]
        apart = [len(task) for task in parts[1]]
        batches: Sequence[Sequence[Batch]] = [[*fit, *rest] for fit, rest in zip(*parts, strict=True)]
    else:
        batches = [_batches(work, request, setup, task, own, "all") for task in tasks]

    def weight(index: int, name: str) -> torch.Tensor:
        return weights.expert(tasks[index], name)

    sample = Sample.of(request.settings)
    return kind(merged, expert, weights.names(), prior, weight, batches, setup.regressed, apart, sample, room)


def solved_over(prior: Give, maps: Sequence[LinearMap], walked: Sequence[Artefact]) -> Give:
    """Return what gives the weights of the model that a round has solved, a tensor at a time.

    Args:
        prior: gives those that the round began with.
        maps: all maps that are regressed.
        walked: the artefacts of the round's units; with none, it is the prior.
    """
    solutions = mapped(artefact.file(SOLUTIONS) for artefact in walked)
    inside: dict[str, list[LinearMap]] = {}
    for map_ in maps:
        for name in map_.parameters:
            if map_.module in solutions:
                inside.setdefault(name, []).append(map_)

    def give(name: str) -> torch.Tensor:
        tensor = prior(name)
        if name not in inside:
            return tensor
        tensor = tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        for map_ in inside[name]:
            map_.place_one(name, solutions[map_.module].tensor(map_.module), tensor)
        return tensor

    return give


class _Part:
    """A share of a walk that stands somewhere in the network."""

    def __init__(self, request: PartRequest) -> None:
        self.walk = request.walk
        self._work = Work(Store.open(request.store))
        stage = Request.from_json(request.request)
        setup = setup_of(self._work, stage)
        self._stack = ExitStack()
        weights = self._stack.enter_context(setup.weights())
        anchored = StoredWeights(self._work.read(stage.inputs["anchor"]))
        before = [self._work.read(Reference.from_json(reference)) for reference in request.before]
        prior = solved_over(anchored, setup.regressed, before)
        limit = parse_bytes(ClusterSettings.model_validate(stage.where["cluster"]).memory_limit)
        self._walk = open_walk(
            *(Walk, self._work, stage, setup, weights, prior, request.tasks),
            held_out=request.held_out,
            room=room_for_answers(limit),
        )
        self._done: list[Mapping[str, str]] = []
        self._solved: list[Mapping[str, str]] = []

    def precedes(self, request: PartRequest) -> bool:
        """Say whether the share stands where the request is, or before it."""
        done = list(request.done)
        if self.walk != request.walk or self._done != done[: len(self._done)]:
            return False
        return len(self._done) < len(done) or self._solved == list(request.solved)[: len(self._solved)]

    def left_behind(self, request: PartRequest) -> bool:
        """Say whether the share was not asked for while the whole unit before the request's was solved."""
        return self.walk == request.walk and len(self._done) < len(request.done) - 1

    def moments(self, request: PartRequest) -> list[tuple[Moments, ...]]:
        """Catch up, and return what was asked for."""
        for reference in request.done[len(self._done) :]:
            artefact = self._work.read(Reference.from_json(reference))
            self._apply(artefact.file(SOLUTIONS))
            self._walk.advance(artefact.read_json("unit.json")["name"])
            self._done.append(reference)
            self._solved.clear()
        for reference in request.solved[len(self._solved) :]:
            self._apply(self._work.read(Reference.from_json(reference)).file(SOLUTIONS))
            self._solved.append(reference)
        found = self._walk.moments(request.unit, request.group)
        # The products that were added up were about as large.
        give_back(sum(moments.nbytes for folds in found for moments in folds))
        return found

    def close(self) -> None:
        """Let go of the checkpoints."""
        self._stack.close()

    def _apply(self, file: Path) -> None:
        with safe_open(file, framework="pt") as handle:
            for module in handle.keys():  # noqa: SIM118 - not a mapping
                self._walk.apply(module, handle.get_tensor(module))


_lock = threading.Lock()
_parts: dict[tuple[int, ...], _Part] = {}
"""The shares of one walk that this process has: one, unless workers died or are to come. Used under the lock."""
_unwanted: set[str] = set()
"""Walks that ended while another one's moments were summed here."""


def _part_of(request: PartRequest) -> _Part:
    # Those that have gone on elsewhere, with workers that came later, would be memory for nothing.
    _drop([tasks for tasks, kept in _parts.items() if tasks != request.tasks and kept.left_behind(request)])
    part = _parts.get(request.tasks)
    if part is None or not part.precedes(request):
        _drop([tasks for tasks, kept in _parts.items() if tasks == request.tasks or kept.walk != request.walk])
        part = _parts[request.tasks] = _Part(request)
    return part


def forget(walk: str) -> None:
    """Let go of what this process has of a walk, at once or when another walk has its answer."""
    # A worker does this where it also answers its scheduler, so that it must not wait.
    if not _lock.acquire(blocking=False):
        _unwanted.add(walk)
        return
    try:
        _drop_walk(walk)
    finally:
        _lock.release()


def _drop_walk(walk: str) -> None:
    _drop([tasks for tasks, part in _parts.items() if part.walk == walk])


def _drop(shares: Sequence[tuple[int, ...]]) -> None:
    for tasks in shares:
        _parts.pop(tasks).close()


class _OwnRows:
    """The rows of all experts' own tokens, in one table, since one model here runs the rows of several experts."""

    def __init__(self, setup: Setup) -> None:
        prefix, tables = dotted(setup.layout.prefix), []
        for expert in setup.experts:
            with expert.model.open() as checkpoint:
                own = own_rows(checkpoint, setup.layout, expert.name)
            tables.append({name.removeprefix(prefix): rows for name, rows in own.items() if name.startswith(prefix)})
        self._vocabulary = setup.layout.vocabulary
        self.tables, self._starts = joined(tables)

    def placed(self, batch: Batch, expert: int) -> Batch:
        """Return a batch of one expert's rows as the joined table counts its tokens."""
        return batch if self._vocabulary is None else shifted(batch, self._vocabulary, self._starts[expert])


def _encoder(setup: Setup, own: _OwnRows, artefact: Artefact) -> nn.Module:
    """Return an encoder without the weights that are merged, with those that are some expert's own."""
    first = setup.experts[0]
    with first.model.open() as checkpoint:
        model = build_model(checkpoint, first, 1, setup.layout)
        # Loaded for encoder weights that travel with the head (a pooler that the base lacks).
        model.load_head(head_tensors(checkpoint, setup.layout, first.name, artefact))
    fill(model.encoder, own.tables)
    encoder: nn.Module = model.encoder
    return encoder


def _batches(
    work: Work, stage: Request, setup: Setup, task: int, own: _OwnRows, part: Literal["all", "fit", "held-out"]
) -> Sequence[Batch]:
    """Return the batches of a task's calibration rows: all, or those to solve on (`fit`), or those held out."""
    expert = setup.experts[task]
    with expert.model.open() as checkpoint:
        model = build_model(checkpoint, expert, stage.settings["batch_size"], setup.layout)
    rows = read_split(work.read(stage.inputs["experts"][expert.name]), "calibration").rows
    if part != "all":
        rows = tuple(row for index, row in enumerate(rows) if is_held_out(index) == (part == "held-out"))
    return [own.placed(batch, task) for batch in model.batches(model.prepare(rows))]
