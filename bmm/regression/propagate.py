"""Propagated regression: each linear map fits what the *merged* model feeds it to what the expert would have answered.

Module-wise regression uses inputs that never arrive, because the earlier modules have changed. Here the network is
walked in forward order, a layer at a time: for each group of maps that read one input,

    minimise  Σ_t ‖ X̃_t [W b]ᵀ − Y_t ‖² / rows_t  +  λ̄ ‖ [W b] − [W_a b_a] ‖²

with `X̃_t` the merged model's own inputs and a column of ones, `Y_t` the expert's outputs on its own inputs. Maps that
write to the residual stream also take up its drift so far: `Y_t + (expert's residual − merged model's residual)`. The
source is this project's own notes on the method, not the paper.

What is kept of each group are its moments, from which every `λ` follows; the walk itself goes on with the solution at
one reference `λ`. In memory at a time: hidden states of all rows, one layer's answers to them, and one group's
moments. Which rows, where experts come from, and what is done with the moments is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bmm.errors import BMMError, CheckpointError
from bmm.modules.linear import LinearMap
from bmm.modules.padding import unpadded
from bmm.progress import Bar
from bmm.regression.posterior import Posterior, Spectrum, decompose, factor

Batch = Mapping[str, Tensor]

# Encoders that normalise after adding: there the residual stream at a writer is what the first map of its half reads.
POST_NORM = frozenset({"bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "deberta", "deberta-v2"})
_WRITERS = {"attention-out": "qkv", "mlp-out": "mlp-in"}
_CHAIN_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Moments:
    """What the regression of one group needs, float64, each task weighted alike.

    `gram` is `Σ_t X̃_tᵀX̃_t / rows_t`, `(in + 1, in + 1)`, or `(in, in)` where the maps have no bias; `cross[module]` is
    `Σ_t Y_tᵀX̃_t / rows_t`, `(out, in + 1)` or `(out, in)`.
    """

    gram: Tensor
    cross: Mapping[str, Tensor]

    def spectrum(self, where: str) -> Spectrum:
        """Return the Gram's eigendecomposition."""
        return decompose(self.gram, where=where)

    def posterior(self, spectrum: Spectrum, module: str, anchor: Tensor) -> Posterior:
        """Return one map's posterior around the anchor `[W_a b_a]`, of the cross moment's shape."""
        mean = anchor.to(torch.float64)
        return factor(spectrum, mean, self.cross[module] - mean @ self.gram)


@dataclass(frozen=True)
class Unit:
    """One part of the walk: a layer, or the maps that fire before or after the layers; groups in firing order.

    `prefix` is the layer's module, None outside the layers.
    """

    name: str
    prefix: str | None
    groups: Mapping[str, tuple[LinearMap, ...]]


def units_of(maps: Sequence[LinearMap]) -> tuple[Unit, ...]:
    """Cut the maps, which are in firing order, into the parts of the walk.

    Raises:
        CheckpointError: maps outside the layers fire between two layers; the walk has no place for them.
    """
    parts: list[tuple[int | None, dict[str, list[LinearMap]]]] = []
    for map_ in maps:
        if not parts or parts[-1][0] != map_.layer:
            parts.append((map_.layer, {}))
        parts[-1][1].setdefault(map_.input_group, []).append(map_)
    layers = [layer for layer, _ in parts]
    inside = [layer for layer in layers if layer is not None]
    first = layers.index(inside[0]) if inside else 0
    if inside != sorted(set(inside)) or None in layers[first : first + len(inside)]:
        raise CheckpointError(
            "this architecture runs its layers in an order that propagated regression does not know; "
            "set regression.mode to module-wise"
        )
    units = []
    for place, (layer, groups) in enumerate(parts):
        prefix = None if layer is None else _layer_prefix(next(iter(groups)))
        name = prefix or ("before the layers" if place < first else "after the layers")
        units.append(Unit(name, prefix, {group: tuple(members) for group, members in groups.items()}))
    return tuple(units)


class Walk:
    """Merged model and experts, side by side, on their way through the network.

    Args:
        merged: the encoder that is being solved; holds the anchor's weights, and is changed in place.
        expert: an encoder of the same architecture, whose weights `load_expert` replaces.
        load_expert: `(task, prefix)` copies one expert's weights below a module prefix into `expert`.
        batches: for each task, the inputs of the forward passes over its calibration rows.
        maps: the maps to regress, in firing order.
        model_type: of the configuration; decides where the residual stream is.
    """

    def __init__(
        self,
        merged: nn.Module,
        expert: nn.Module,
        load_expert: Callable[[int, str], None],
        batches: Sequence[Sequence[Batch]],
        maps: Sequence[LinearMap],
        model_type: str,
    ) -> None:
        self._merged = merged
        self._expert = expert
        self._load_expert = load_expert
        self._post_norm = model_type in POST_NORM
        self._tasks = [[_Step(batch) for batch in task] for task in batches]
        self._inside = False
        self.units = units_of(maps)
        self._layers = [unit.prefix for unit in self.units if unit.prefix is not None]

    def moments(self, unit: Unit, bar: Bar) -> Iterator[tuple[str, Moments]]:
        """Yield the moments of each group of a unit; the caller solves it (`apply`) before asking for the next."""
        self._ask_experts(unit)
        for group, members in unit.groups.items():
            source = self._residual_source(unit, members)
            total: Moments | None = None
            for task in self._tasks:
                part = _TaskMoments(members)
                for step in task:
                    inputs, residual = self._read(unit, step, group, source)
                    targets = {map_.module: step.answers[map_.module] for map_ in members}
                    if source is not None and residual is not None:
                        drift = step.residuals[source] - residual
                        targets = {name: target + drift for name, target in targets.items()}
                    part.add(inputs, targets)
                    bar.advance()
                total = part.weighted() if total is None else _sum(total, part.weighted())
            assert total is not None  # noqa: S101 - a merge has at least two tasks
            yield group, total

    def apply(self, map_: LinearMap, solution: Tensor) -> None:
        """Give the merged model one map's solution, `[W b]` of shape `(out, in + 1)`, or `W` without bias."""
        module = self._merged.get_submodule(map_.module)
        assert isinstance(module, nn.Linear)  # noqa: S101 - `discover` found it as one
        with torch.no_grad():
            module.weight.copy_(solution[:, : map_.inputs])
            if module.bias is not None:
                module.bias.copy_(solution[:, map_.inputs])

    def advance(self, unit: Unit) -> None:
        """Carry the hidden states of all rows through a solved layer, in the merged model and in the experts."""
        if unit.prefix is None:
            return
        self._enter()
        for task, steps in enumerate(self._tasks):
            if any(step.beyond is None for step in steps):
                self._load_expert(task, unit.prefix)
            for step in steps:
                if step.beyond is None:
                    step.beyond = step.through(self._expert, unit.prefix, step.expert)
                step.merged = step.through(self._merged, unit.prefix, step.merged)
                step.expert, step.beyond = step.beyond, None
                step.answers.clear()
                step.residuals.clear()

    def _enter(self) -> None:
        """Find what reaches the first layer in the merged model and in the experts, once."""
        if self._inside:
            return
        for task, steps in enumerate(self._tasks):
            self._load_expert(task, "")
            for index, step in enumerate(steps):
                if task == index == 0:
                    self._check_chain(step.batch)
                step.arguments, step.keywords = _arguments(self._expert, self._layers[0], step.batch)
                step.expert = step.hidden()
                step.merged = _Step(step.batch, *_arguments(self._merged, self._layers[0], step.batch)).hidden()
        self._inside = True

    def _check_chain(self, batch: Batch) -> None:
        """Make sure that running layer after layer is what the encoder does; two rows tell."""
        batch = {name: tensor[:2] for name, tensor in batch.items()}
        step = _Step(batch, *_arguments(self._expert, self._layers[0], batch))
        hidden = step.hidden()
        for prefix in self._layers:
            expected = _Step(batch, *_arguments(self._expert, prefix, batch)).hidden()
            if not torch.allclose(hidden, expected, rtol=_CHAIN_TOLERANCE, atol=_CHAIN_TOLERANCE):
                raise CheckpointError(
                    f"{prefix} of this architecture is not fed by the layer before it alone, which propagated "
                    "regression needs; set regression.mode to module-wise"
                )
            hidden = step.through(self._expert, prefix, hidden)

    def _ask_experts(self, unit: Unit) -> None:
        """Let each expert run the unit on its own inputs; keep its answers, and where its residual stream was."""
        if unit.prefix is not None:
            self._enter()
        names = [map_.module for members in unit.groups.values() for map_ in members]
        found = (self._residual_source(unit, members) for members in unit.groups.values())
        sources = [source for source in found if source is not None]
        for task, steps in enumerate(self._tasks):
            self._load_expert(task, unit.prefix or "")
            for step in steps:
                with _watching(self._expert, sources, names) as seen:
                    step.beyond = self._run(self._expert, unit, step, step.expert)
                step.answers = {name: unpadded(tensor, step.mask) for name, tensor in seen.outputs.items()}
                step.residuals = {name: unpadded(tensor, step.mask) for name, tensor in seen.inputs.items()}

    def _read(self, unit: Unit, step: _Step, group: str, source: str | None) -> tuple[Tensor, Tensor | None]:
        """Return the merged model's rows `(rows, in)` at a group, and its residual stream if there is a source."""
        with _watching(self._merged, [group] if source is None else [source, group], [], last=group) as seen:
            self._run(self._merged, unit, step, step.merged)
        residual = None if source is None else unpadded(seen.inputs[source], step.mask)
        return unpadded(seen.inputs[group], step.mask), residual

    def _run(self, encoder: nn.Module, unit: Unit, step: _Step, hidden: Tensor) -> Tensor | None:
        """Run one unit; None if the pass was ended early or the unit is no layer."""
        try:
            if unit.prefix is not None:
                return step.through(encoder, unit.prefix, hidden)
            with torch.inference_mode(), _given(encoder, self._layers if self._inside else [], step, hidden):
                encoder(**step.batch)
        except _Reached:
            pass
        return None

    def _residual_source(self, unit: Unit, members: Sequence[LinearMap]) -> str | None:
        """Return the group whose input is the residual stream at a writer, where this is known."""
        reads = _WRITERS.get(members[0].type)
        if not self._post_norm or unit.prefix is None or reads is None:
            return None
        sources = [group for group, maps in unit.groups.items() if maps[0].type == reads]
        return sources[0] if len(sources) == 1 else None


class _Step:
    """One batch of one task: how the encoder calls its layers for it, and the hidden states that it has reached."""

    def __init__(
        self, batch: Batch, arguments: tuple[Any, ...] = (), keywords: Mapping[str, Any] | None = None
    ) -> None:
        self.batch = batch
        self.mask = batch.get("attention_mask")
        self.arguments = arguments
        self.keywords = dict(keywords or {})
        self.expert = self.merged = torch.empty(0)
        self.beyond: Tensor | None = None
        self.tuples = False
        self.answers: dict[str, Tensor] = {}
        self.residuals: dict[str, Tensor] = {}

    def hidden(self) -> Tensor:
        """Return the hidden states `(rows, tokens, width)` among the arguments of a layer's call."""
        tensor: Tensor = self.arguments[0] if self.arguments else self.keywords["hidden_states"]
        return tensor

    def through(self, encoder: nn.Module, prefix: str, hidden: Tensor) -> Tensor:
        """Return what one layer makes of hidden states."""
        layer = encoder.get_submodule(prefix)
        with torch.inference_mode():
            if self.arguments:
                output = layer(hidden, *self.arguments[1:], **self.keywords)
            else:
                output = layer(**{**self.keywords, "hidden_states": hidden})
        self.tuples = isinstance(output, tuple)
        tensor: Tensor = output[0] if self.tuples else output
        return tensor


class _TaskMoments:
    """Sums over one task's batches: products in float32, sums in float64."""

    def __init__(self, members: Sequence[LinearMap]) -> None:
        self._members = members
        self._gram: Tensor | None = None
        self._cross: dict[str, Tensor] = {}
        self._rows = 0

    def add(self, inputs: Tensor, targets: Mapping[str, Tensor]) -> None:
        """Add rows `(rows, in)` and, for each map, its targets `(rows, out)`."""
        rows = inputs.to(torch.float32)
        if self._members[0].bias:
            rows = torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
        gram = (rows.T @ rows).to(torch.float64)
        self._gram = gram if self._gram is None else self._gram + gram
        for name, target in targets.items():
            cross = (target.to(torch.float32).T @ rows).to(torch.float64)
            self._cross[name] = cross if name not in self._cross else self._cross[name] + cross
        self._rows += len(rows)

    def weighted(self) -> Moments:
        """Return the sums over the number of rows."""
        if self._gram is None or not bool(torch.isfinite(self._gram).all()):
            raise BMMError(f"the inputs of {self._members[0].module} are not finite on the calibration rows")
        scale = 1.0 / self._rows
        return Moments(self._gram * scale, {name: cross * scale for name, cross in self._cross.items()})


def _sum(left: Moments, right: Moments) -> Moments:
    cross = {name: tensor + right.cross[name] for name, tensor in left.cross.items()}
    return Moments(left.gram + right.gram, cross)


class _Reached(Exception):  # noqa: N818 - not an error: the pass has shown what was wanted
    """Ends a forward pass early."""


def _arguments(encoder: nn.Module, prefix: str, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Run an encoder up to one layer and return the arguments that the layer is called with."""
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def record(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        found.append((arguments, keywords))
        raise _Reached

    handle = encoder.get_submodule(prefix).register_forward_pre_hook(record, with_kwargs=True)
    try:
        with torch.inference_mode():
            encoder(**batch)
    except _Reached:
        return found[0]
    finally:
        handle.remove()
    raise BMMError(f"the layer {prefix} was not reached")


@dataclass
class _Seen:
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


@contextmanager
def _watching(
    encoder: nn.Module, inputs: Sequence[str], outputs: Sequence[str], *, last: str | None = None
) -> Iterator[_Seen]:
    """Record inputs and outputs of linear maps during a pass, which ends when the input of `last` is reached."""
    seen = _Seen({}, {})

    def take_input(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def take(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            seen.inputs[name] = arguments[0]
            if name == last:
                raise _Reached

        return take

    def take_output(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def take(_: nn.Module, __: Any, output: Tensor) -> None:
            seen.outputs[name] = output

        return take

    handles = [encoder.get_submodule(name).register_forward_pre_hook(take_input(name)) for name in inputs]
    handles += [encoder.get_submodule(name).register_forward_hook(take_output(name)) for name in outputs]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class _Given(nn.Module):
    """Stands in for a layer whose outcome is known."""

    def __init__(self, outcome: Any) -> None:
        super().__init__()
        self._outcome = outcome

    def forward(self, *_: Any, **__: Any) -> Any:
        """Return the outcome."""
        return self._outcome


@contextmanager
def _given(encoder: nn.Module, layers: Sequence[str], step: _Step, hidden: Tensor) -> Iterator[None]:
    """Let every layer return `hidden`: what comes after the layers sees the last one's outcome, at no cost."""
    real = {prefix: encoder.get_submodule(prefix) for prefix in layers}
    try:
        for prefix in layers:
            encoder.set_submodule(prefix, _Given((hidden,) if step.tuples else hidden))
        yield
    finally:
        for prefix, layer in real.items():
            encoder.set_submodule(prefix, layer)


def _layer_prefix(module: str) -> str:
    """Return the name of the layer that a module stands in: everything up to its index."""
    parts = module.split(".")
    index = next(place for place, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[: index + 1])
