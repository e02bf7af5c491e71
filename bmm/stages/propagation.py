"""The walk of propagated regression as artefacts, one for each layer: a kill costs the layer in work.

Part of the search stage, which needs the moments; the walk itself is `bmm.regression.propagate`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from bmm.evaluation.model import TaskModel
from bmm.evaluation.vocabulary import fill, joined, shifted
from bmm.kinds.settings import reading
from bmm.prediction import StoredWeights, build_model, head_tensors, own_rows, read_split
from bmm.progress import progress
from bmm.regression.moments import Moments, total, trusted
from bmm.regression.propagate import Walk
from bmm.regression.units import Unit, units_of
from bmm.stages.request import Request, Work
from bmm.stages.setup import Setup
from bmm.store import Artefact, Draft
from bmm.weights import ExpertWeights

WALK_VERSION = 3
_FILE = "moments.safetensors"


def walk_moments(
    work: Work, request: Request, setup: Setup, weights: ExpertWeights, anchored: StoredWeights
) -> Callable[[str], Moments]:
    """Walk through the network, layer by layer, and return the moments by input group.

    Layers that an earlier, killed run has finished are taken from the store.
    """
    lam = request.settings["regression"]["walk_lambda"]
    inputs = {name: request.inputs[name] for name in ("base", "models", "layout", "anchor")}
    inputs["calibration"] = {
        expert.name: work.read(request.inputs["experts"][expert.name]).read_json("expert.json")["splits"]["calibration"]
        for expert in setup.experts
    }
    settings = {
        "lambda": lam,
        "batch_size": request.settings["batch_size"],
        "reading": [reading(expert.task) for expert in setup.experts],
    }
    walk = _Walker(work, request, setup, weights, anchored)
    place: dict[str, Artefact] = {}
    with progress("walking through the layers", walk.steps) as bar:
        for unit in walk.units:

            def make(draft: Draft, unit: Unit = unit) -> None:
                tensors: dict[str, torch.Tensor] = {}
                rows = {}
                for group in unit.groups:
                    moments = total(walk.ready().moments(unit.name, group, bar.advance))
                    tensors |= {f"{group}:{name}": tensor for name, tensor in moments.tensors().items()}
                    rows[group] = moments.rows
                    walk.solve(unit, group, moments, lam)
                save_file(tensors, draft.path / _FILE)
                draft.write_json("rows.json", rows)

            made = work.made
            reference = work.obtain(
                "walk", {**inputs, "unit": unit.name}, make, settings=settings, version=WALK_VERSION
            )
            artefact = work.read(reference)
            place |= dict.fromkeys(unit.groups, artefact)
            walk.finish(unit, artefact, replay=work.made == made, lam=lam)

    return lambda group: read_moments(place[group], group, walk.members(group))


def read_moments(artefact: Artefact, group: str, modules: list[str]) -> Moments:
    """Return the moments of one input group."""
    with safe_open(artefact.file(_FILE), framework="pt") as handle:
        cross, power = (
            {module: handle.get_tensor(f"{group}:{kind}:{module}") for module in modules} for kind in ("cross", "power")
        )
        rows = tuple(artefact.read_json("rows.json")[group])
        return Moments(handle.get_tensor(f"{group}:gram"), cross, power, rows)


class _Walker:
    """A walk whose models are built when the first unit has to be computed, and kept up with units that need not be."""

    def __init__(
        self, work: Work, request: Request, setup: Setup, weights: ExpertWeights, anchored: StoredWeights
    ) -> None:
        self._work = work
        self._request = request
        self._setup = setup
        self._weights = weights
        self._anchored = anchored
        self._walk: Walk | None = None
        self._behind: list[tuple[Unit, Artefact, float]] = []
        self.units = units_of(setup.regressed)

    @property
    def steps(self) -> int:
        """Number of batches that the whole walk looks at."""
        rows = [len(read_split(self._data(expert.name), "calibration")) for expert in self._setup.experts]
        size: int = self._request.settings["batch_size"]
        return sum(-(-count // size) for count in rows) * sum(len(unit.groups) for unit in self.units)

    def members(self, group: str) -> list[str]:
        """Return the modules that read one input."""
        return [map_.module for map_ in self._setup.regressed if map_.input_group == group]

    def ready(self) -> Walk:
        """Return the walk, standing before the first unit that is not finished."""
        if self._walk is None:
            self._walk = self._start()
        for unit, artefact, lam in self._behind:
            self._replay(self._walk, unit, artefact, lam)
        self._behind.clear()
        return self._walk

    def solve(self, unit: Unit, group: str, moments: Moments, lam: float) -> None:
        """Give the merged model the solution of one group."""
        self._solve(self.ready(), unit, group, moments, lam)

    def finish(self, unit: Unit, artefact: Artefact, *, replay: bool, lam: float) -> None:
        """Go past a unit: at once if it was computed just now, else when somebody needs to stand behind it."""
        if replay:
            self._behind.append((unit, artefact, lam))
        else:
            self.ready().advance(unit.name)

    def _replay(self, walk: Walk, unit: Unit, artefact: Artefact, lam: float) -> None:
        for group in unit.groups:
            self._solve(walk, unit, group, read_moments(artefact, group, self.members(group)), lam)
        walk.advance(unit.name)

    def _solve(self, walk: Walk, unit: Unit, group: str, moments: Moments, lam: float) -> None:
        moments = trusted(moments, unit.groups[group])
        spectrum = moments.spectrum(f"the input of {group}")
        for map_ in unit.groups[group]:
            posterior = moments.posterior(spectrum, map_.module, map_.matrix(self._anchored))
            walk.apply(map_.module, posterior.mean(lam))

    def _start(self) -> Walk:
        merged = self._model(self._anchored.state())
        expert = self._model(self._anchored.state())
        parameters = dict(expert.encoder.named_parameters())

        def load_expert(index: int, prefix: str) -> None:
            with torch.no_grad():
                for name in self._weights.names():
                    if name in parameters and name.startswith(f"{prefix}." if prefix else ""):
                        parameters[name].copy_(self._weights.expert(index, name))

        batches = []
        size = self._request.settings["batch_size"]
        for index, source in enumerate(self._setup.experts):
            with source.model.open() as checkpoint:
                model = build_model(checkpoint, source, size, self._setup.layout)
            rows = read_split(self._data(source.name), "calibration").rows
            batches.append([self._placed(batch, index) for batch in model.batches(model.prepare(rows))])
        return Walk(merged.encoder, expert.encoder, load_expert, batches, self._setup.regressed)

    def _model(self, state: Mapping[str, torch.Tensor]) -> TaskModel:
        first = self._setup.experts[0]
        with first.model.open() as checkpoint:
            model = build_model(checkpoint, first, 1, self._setup.layout)
            # Loaded for encoder weights that travel with the head (a pooler that the base lacks).
            model.load_head(head_tensors(checkpoint, self._setup.layout, first.name, self._data(first.name)))
        model.load_encoder(state)
        fill(model.encoder, self._own_rows[0])
        return model

    @cached_property
    def _own_rows(self) -> tuple[dict[str, torch.Tensor], list[int]]:
        """The rows of all experts' own tokens, in one table, since one model here runs the rows of all experts."""
        prefix, tables = f"{self._setup.layout.prefix}.", []
        for expert in self._setup.experts:
            with expert.model.open() as checkpoint:
                own = own_rows(checkpoint, self._setup.layout, expert.name)
            tables.append({name.removeprefix(prefix): rows for name, rows in own.items() if name.startswith(prefix)})
        return joined(tables)

    def _placed(self, batch: Mapping[str, torch.Tensor], expert: int) -> Mapping[str, torch.Tensor]:
        vocabulary = self._setup.layout.vocabulary
        return batch if vocabulary is None else shifted(batch, vocabulary, self._own_rows[1][expert])

    def _data(self, expert: str) -> Artefact:
        return self._work.read(self._request.inputs["experts"][expert])
