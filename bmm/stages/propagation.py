"""The walk of propagated regression as artefacts, one for each layer: a kill costs the layer in work.

Part of the search stage, which needs the moments. Here is what decides a layer's artefact, in which order they are
made, round after round, and how they are read back; how one layer is solved is `bmm.stages.walker`, what the tasks'
models do meanwhile `bmm.stages.walk_part`, and the walk itself `bmm.regression.propagate`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open

from bmm.assembly import Solved
from bmm.checkpoint.mapped import mapped
from bmm.digest import digest_json
from bmm.grams.settings import sample_in
from bmm.kinds.settings import reading
from bmm.modules.linear import LinearMap
from bmm.modules.units import Unit, units_of
from bmm.prediction import StoredWeights
from bmm.progress import progress
from bmm.regression.head_sums import output_head
from bmm.regression.moments import Moments
from bmm.stages.request import Request, Work
from bmm.stages.setup import Setup
from bmm.stages.walk_part import SOLUTIONS, solved_over
from bmm.stages.walker import MOMENTS, WALK_VERSION, Walker
from bmm.store import Artefact, Draft, Reference


@dataclass(frozen=True)
class Walked:
    """What a walk leaves behind.

    Attributes:
        moments: gives the moments of an input group.
        lambdas: by map, the `λ` that it was solved with on the way.
        prior: gives the tensors that the last round leaned on: the anchor's, or those of the round before.
        solved: gives what became of a map at that `λ`.
    """

    moments: Callable[[str], Moments]
    lambdas: Mapping[str, float]
    prior: Callable[[str], torch.Tensor]
    solved: Callable[[str], Solved]


def walk(
    work: Work,
    request: Request,
    setup: Setup,
    anchored: StoredWeights,
    strengths: Mapping[str, float] | None = None,
) -> Walked:
    """Walk through the network, layer by layer, as often as the recipe has rounds.

    Layers that an earlier run, killed or with the same strengths up to there, has finished are taken from the store;
    with all of them there, no model is built and no worker starts.

    Args:
        work: the way to the store.
        request: that of the search.
        setup: the merge.
        anchored: gives the anchor's tensors.
        strengths: each map's `λ`, `math.inf` for those that keep the anchor; without, the recipe's `walk_lambda`. With
            several, moments are not kept, and asking for them is a mistake.

    Raises:
        ClusterError: the Dask workers failed for good.
    """
    units = units_of(setup.regressed)
    inputs, settings = _identity(work, request, setup)
    if strengths is not None:
        settings["lambda"] = _said_strengths(strengths, setup.regressed)
    rounds = request.settings["regression"]["rounds"]
    steps = sum(len(unit.groups) for unit in units) * len(setup.experts)
    prior: Callable[[str], torch.Tensor] = anchored
    before: list[Reference] = []
    with progress("walking through the layers", rounds * steps) as bar:
        for turn in range(rounds):
            if before:
                prior = solved_over(anchored, setup.regressed, [work.read(reference) for reference in before])
                inputs = {**inputs, "before": [reference.digest for reference in before]}
            done: list[Reference] = []
            with ExitStack() as stack:
                identity = digest_json([turn, inputs, settings])
                walker = Walker(work, request, setup, prior, before, identity, strengths, stack, bar)
                passed: list[LinearMap] = []
                for unit in units:
                    passed += [map_ for members in unit.groups.values() for map_ in members]
                    # What a layer's weights are made of: its own strength and those of the layers before it.
                    own = settings if strengths is None else {**settings, "lambda": _said_strengths(strengths, passed)}

                    # Sums of a walk of its own strengths serve no other, and are larger than the model several times.
                    moments = not isinstance(own["lambda"], Mapping)

                    def make(draft: Draft, unit: Unit = unit, walker: Walker = walker, moments: bool = moments) -> None:
                        walker.solve_unit(draft, unit, moments=moments)

                    made = work.made
                    # Once its answers were computed, token by token; the sums are the same up to rounding.
                    own = {**own, "answers": "none"} if unit == output_head(units) else own
                    reference = work.obtain(
                        "walk", {**inputs, "unit": unit.name}, make, settings=own, version=WALK_VERSION
                    )
                    if work.made == made:
                        bar.advance(len(unit.groups) * len(setup.experts))
                    walker.done.append(reference)
                done = walker.done
            before = done
    place: dict[str, Artefact] = {}
    lambdas: dict[str, float] = {}
    conditions: dict[str, float | None] = {}
    unreached: set[str] = set()
    for unit, reference in zip(units, before, strict=True):
        artefact = work.read(reference)
        place |= dict.fromkeys(unit.groups, artefact)
        said = artefact.read_json("unit.json")
        lambdas |= {module: math.inf if lam is None else lam for module, lam in said["lambdas"].items()}
        conditions |= said["conditions"]
        unreached |= set(said["anchored"])
    members = _members(setup.regressed)
    solutions = mapped(artefact.file(SOLUTIONS) for artefact in map(work.read, before))

    def solved(module: str) -> Solved:
        return Solved(solutions[module].tensor(module), conditions[module], module in unreached)

    return Walked(lambda group: read_moments(place[group], group, members[group]), lambdas, prior, solved)


def _said_strengths(strengths: Mapping[str, float], maps: Sequence[LinearMap]) -> Any:
    """Return strengths as JSON: one number where all are alike, so that walks share what they have in common."""
    said = {map_.module: strengths[map_.module] for map_ in maps}
    if len(set(said.values())) == 1 and not math.isinf(one := next(iter(said.values()))):
        return one
    return {module: None if math.isinf(lam) else lam for module, lam in said.items()}


def read_moments(artefact: Artefact, group: str, modules: Sequence[str]) -> Moments:
    """Return the moments of one input group."""
    with safe_open(artefact.file(MOMENTS), framework="pt") as handle:
        cross, power = (
            {module: handle.get_tensor(f"{group}:{kind}:{module}") for module in modules} for kind in ("cross", "power")
        )
        rows = tuple(artefact.read_json("unit.json")["rows"][group])
        return Moments(handle.get_tensor(f"{group}:gram"), cross, power, rows)


def _identity(work: Work, request: Request, setup: Setup) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what decides a walk: inputs and settings."""
    inputs = {name: request.inputs[name] for name in ("base", "models", "layout", "anchor")}
    inputs["calibration"] = {
        expert.name: work.read(request.inputs["experts"][expert.name]).read_json("expert.json")["splits"]["calibration"]
        for expert in setup.experts
    }
    settings = {
        "lambda": request.settings["regression"]["walk_lambda"],
        "batch_size": request.settings["batch_size"],
        "reading": [reading(expert.task) for expert in setup.experts],
        "task_weights": request.settings["regression"]["task_weights"],
        **sample_in(request.settings),
    }
    return inputs, settings


def _members(maps: Sequence[LinearMap]) -> dict[str, list[str]]:
    members: dict[str, list[str]] = {}
    for map_ in maps:
        members.setdefault(map_.input_group, []).append(map_.module)
    return members
