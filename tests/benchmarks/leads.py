"""Leads that the notes on the method name and the product does not follow, each measured as a row of the table.

Propagated regression leaves to the anchor what is not a matrix. LayerNorm's gains and shifts and layer scales are
linear too, a channel at a time, so they can be fitted in the same walk: `y ≈ g x + b` of each channel from what the
merged model has to what the expert answers, with the anchor's values as prior. And tasks need not count alike: here by
the precision of each one's noise, as the residuals of a group of maps show it.

What does not help is not in `bmm`; the numbers stand in the README. Recipes and other projects' code are elsewhere
(`benchmarks.rows`, `benchmarks.peers`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor, nn

from bmm.modules.linear import LinearMap
from bmm.modules.units import Unit
from bmm.modules.watch import Addition, Observer, Product
from bmm.prediction import StoredWeights
from bmm.regression.moments import Moments, total, trusted
from bmm.regression.propagate import Walk
from bmm.stages.anchor import write_state
from bmm.stages.request import Request, Work
from bmm.stages.setup import setup_of
from bmm.stages.walk_part import open_walk
from bmm.store import Draft, Reference

VERSION = 1
# Times that the tasks' noise is estimated and the group solved again.
_REWEIGHINGS = 2


@dataclass(frozen=True)
class Lead:
    """What a walk does beyond the product's.

    Attributes:
        norms: LayerNorm's gains and shifts are regressed.
        scales: layer scales are regressed.
        by_noise: tasks count by the precision of their noise, in each group of maps.
    """

    norms: bool = False
    scales: bool = False
    by_noise: bool = False


def merge(lead: Lead, strength: float, work: Work, request: Request) -> tuple[Reference, float]:
    """Return the artefact of the merged encoder under canonical names, and the seconds that it took.

    Args:
        lead: what is tried.
        strength: `λ` of maps and of channels.
        work: the way to the store.
        request: a search stage's; its own regression settings do not matter.
    """
    setup = setup_of(work, request)
    anchor = work.read(request.inputs["anchor"])
    data = {
        expert.name: work.read(request.inputs["experts"][expert.name]).read_json("expert.json")["splits"]["calibration"]
        for expert in setup.experts
    }
    inputs = {name: request.inputs[name] for name in ("base", "models", "layout", "anchor")} | {"calibration": data}

    def make(draft: Draft) -> None:
        started = perf_counter()
        anchored = StoredWeights(anchor)
        with setup.weights() as weights:
            walk = open_walk(LeadWalk, work, request, setup, weights, anchored, range(len(setup.experts)))
            solved = walk.solve(lead, strength)
        draft.provenance["seconds"] = perf_counter() - started
        write_state(draft.path, setup, lambda name: solved[name] if name in solved else anchored(name))

    settings = {**vars(lead), "lambda": strength, "batch_size": request.settings["batch_size"]}
    reference = work.obtain("lead", inputs, make, settings=settings, version=VERSION)
    return reference, float(work.read(reference).provenance["seconds"])


class LeadWalk(Walk):
    """A walk, in this process, that also fits what is linear a channel at a time."""

    def solve(self, lead: Lead, strength: float) -> dict[str, Tensor]:
        """Walk to the end; return the solved parameters by canonical name."""
        solved: dict[str, Tensor] = {}
        for unit in self.units:
            changed: set[str] = set()
            norms = self._norms(unit) if lead.norms else {}
            for group, members in unit.groups.items():
                for name in norms.pop(members[0].module, ()):
                    changed |= self._fit_norm(unit, name, strength)
                parts = [found for (found,) in self.moments(unit.name, group)]
                weights = self._noise(parts, members, strength) if lead.by_noise else None
                for map_, solution in self._solutions(parts, weights, members, strength).items():
                    self.apply(map_.module, solution)
                    changed |= set(map_.parameters)
                for map_ in members:
                    if lead.scales and map_.scale is not None and self._layer(unit) is not None:
                        changed |= self._fit_scale(unit, map_, map_.scale, strength)
            for name in (name for names in norms.values() for name in names):
                changed |= self._fit_norm(unit, name, strength)
            solved |= {name: self._merged.get_parameter(name).detach().clone() for name in changed}
            self.advance(unit.name)
        return solved

    def _solutions(
        self, parts: Sequence[Moments], weights: Sequence[float] | None, members: Sequence[LinearMap], strength: float
    ) -> dict[LinearMap, Tensor]:
        # A sum uses up its parts, and these are asked for twice.
        moments = trusted(total(deepcopy(list(parts)), weights), members)
        spectrum = moments.spectrum(members[0].module)
        return {
            map_: moments.posterior(spectrum, map_.module, map_.matrix(self._prior)).mean(strength) for map_ in members
        }

    def _noise(self, parts: Sequence[Moments], members: Sequence[LinearMap], strength: float) -> list[float]:
        """Return the precision of each task's noise in a group, their mean 1."""
        weights = [1.0] * len(parts)
        for _ in range(_REWEIGHINGS):
            found = self._solutions(parts, weights, members, strength)
            errors = [sum(part.error(map_.module, value) for map_, value in found.items()) for part in parts]
            if min(errors) <= 0:
                return weights
            scale = len(errors) / sum(1 / error for error in errors)
            weights = [scale / error for error in errors]
        return weights

    def _norms(self, unit: Unit) -> dict[str, list[str]]:
        """Return the unit's LayerNorms by the map that fires next; behind the last map under an empty name."""
        layer = self._layer(unit)
        if layer is None:
            return {}
        self._arrive(unit)
        firsts = {members[0].module for members in unit.groups.values()}
        waiting: list[str] = []
        found: dict[str, list[str]] = {}

        def fired(name: str) -> None:
            if name not in firsts:
                waiting.append(name)
            elif waiting:
                found.setdefault(name, []).extend(waiting)
                waiting.clear()

        module = self._merged.get_submodule(layer)
        handles = [
            part.register_forward_hook(lambda *_, name=f"{layer}.{name}": fired(name))
            for name, part in module.named_modules()
            if isinstance(part, nn.LayerNorm) or f"{layer}.{name}" in firsts
        ]
        step = self._tasks[0][0]
        with torch.inference_mode():
            step.merged_calls[layer].through(module, step.merged)
        for handle in handles:
            handle.remove()
        return found | {"": waiting}

    def _fit_norm(self, unit: Unit, name: str, strength: float) -> set[str]:
        """Fit a LayerNorm's gain and shift to the experts' answers of it."""
        sums = _ChannelSums()
        norm = self._merged.get_submodule(name)
        shape, epsilon = norm.normalized_shape, norm.eps

        def plain(_: nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> None:
            seen["x"] = nn.functional.layer_norm(inputs[0], shape, eps=epsilon)

        def answer(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
            seen["y"] = output

        layer = self._layer(unit) or ""
        handles = [
            norm.register_forward_hook(plain),
            self._expert.get_submodule(name).register_forward_hook(answer),
        ]
        for task, steps in enumerate(self._tasks):
            self._of_expert.bring(layer, self._of(task))
            sums.begin()
            for step in steps:
                seen: dict[str, Tensor] = {}
                with torch.inference_mode():
                    step.merged_calls[layer].through(self._merged.get_submodule(layer), step.merged)
                    step.expert_calls[layer].through(self._expert.get_submodule(layer), step.expert)
                mask = step.batch.get("attention_mask")
                sums.add(_unpadded(seen["x"], mask), _unpadded(seen["y"], mask))
        for handle in handles:
            handle.remove()
        gain, shift = sums.fit(self._prior(f"{name}.weight"), self._prior(f"{name}.bias"), strength)
        with torch.no_grad():
            self._merged.get_parameter(f"{name}.weight").copy_(gain)
            self._merged.get_parameter(f"{name}.bias").copy_(shift)
        return {f"{name}.weight", f"{name}.bias"}

    def _fit_scale(self, unit: Unit, map_: LinearMap, scale: str, strength: float) -> set[str]:
        """Fit a layer scale so that the merged stream becomes the experts', given the solved map before it."""
        sums = _ChannelSums()
        for steps in self._tasks:
            sums.begin()
            for step in steps:
                seen = _Branch(map_)
                self._run(seen, self._merged, unit, step, step.merged)
                sums.add(seen.answer, step.totals[map_.module] - seen.stream)
        gain, _ = sums.fit(self._prior(scale), None, strength)
        with torch.no_grad():
            self._merged.get_parameter(scale).copy_(gain)
        return {scale}


class _Branch(Observer):
    """What a map of the merged model answers, and the stream that this is added to, `(rows, out)`."""

    def __init__(self, map_: LinearMap) -> None:
        self._site = map_.site

    def answered(self, product: Product, output: Tensor) -> None:
        if product.site == self._site:
            self._product = product
            self.answer = product.kept(output).clone()

    def added(self, addition: Addition) -> None:
        if addition.site == self._site:
            self.stream = self._product.kept(addition.stream).clone()


class _ChannelSums:
    """Sums over rows of what fits `y ≈ g x + b` for every channel, each task weighted alike, float64."""

    def __init__(self) -> None:
        self._tasks: list[list[tuple[Tensor, Tensor]]] = []

    def begin(self) -> None:
        """Begin the next task."""
        self._tasks.append([])

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows `(rows, channels)`."""
        x, y = x.to(torch.float64), y.to(torch.float64)
        moments = torch.stack([(x * x).sum(0), x.sum(0), (x * y).sum(0), y.sum(0)])
        self._tasks[-1].append((moments, torch.tensor(len(x), dtype=torch.float64)))

    def fit(self, gain: Tensor, shift: Tensor | None, strength: float) -> tuple[Tensor, Tensor]:
        """Return the posterior mean of gain and shift around prior values; without a shift it is zero."""
        tasks = [torch.stack([m for m, _ in parts]).sum(0) / sum(n for _, n in parts) for parts in self._tasks]
        xx, x, xy, y = torch.stack(tasks).sum(0)
        count = float(len(tasks))
        gain = gain.to(torch.float64)
        if shift is None:
            return gain + (xy - gain * xx) / (xx + strength * xx.mean()), torch.zeros_like(gain)
        shift = shift.to(torch.float64)
        # As for a map of one input and a column of ones: λ̄ is λ times the mean of the Gram's diagonal.
        ridge = strength * (xx + count) / 2
        first, second = xx + ridge, count + ridge
        left, right = xy - gain * xx - shift * x, y - gain * x - shift * count
        determinant = first * second - x * x
        return gain + (second * left - x * right) / determinant, shift + (first * right - x * left) / determinant


def _unpadded(tensor: Tensor, mask: Tensor | None) -> Tensor:
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if mask is None else rows[mask.reshape(-1).bool()]


LEADS: Mapping[str, Lead] = {
    "lead: LayerNorms too": Lead(norms=True),
    "lead: layer scales too": Lead(scales=True),
    "lead: tasks by their noise": Lead(by_noise=True),
}
