"""Propagated regression: each linear map fits what the *merged* model feeds it to what the expert would have answered.

Module-wise regression uses inputs that never arrive, because the earlier modules have changed. Here the network is
walked in forward order, a layer at a time: for each group of maps that read one input,

    minimise  Σ_t ‖ X̃_t [W b]ᵀ − Y_t ‖² / rows_t  +  λ̄ ‖ [W b] − [W_a b_a] ‖²

with `X̃_t` the merged model's own inputs and a column of ones, `Y_t` the expert's outputs on its own inputs. A map
whose answer is added to the residual stream also takes up the stream's drift so far: it is to make the merged stream
`r̃ + s̃ ∘ (X̃ [W b]ᵀ)` the expert's `r + s ∘ Y`, so its target is `(r + s ∘ Y − r̃) / s̃` (`s`: layer scale, if any). The
source is this project's own notes on the method, not the paper.

Experts of a mixture are sent other tokens in the merged model than in the fine-tuned one, so their rows do not pair
up; their target is what the expert's own matrix makes of the merged model's inputs, `Y_t = X̃_t W_tᵀ`.

In memory at a time: hidden states of all rows, one layer's weights, the experts' answers to them as far as there is
room, and one group's moments (of a network that is no chain of layers: all weights). With a sample of each sequence's
tokens, the experts' answers and the merged model's inputs are those of the same tokens (`bmm.modules.tokens`). Which
rows, where weights come from, and what is done with the moments is the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from bmm.errors import BMMError
from bmm.modules.chain import Batch, given
from bmm.modules.linear import LinearMap
from bmm.modules.residence import Give, Resident
from bmm.modules.tokens import Sample, Tokens
from bmm.modules.units import Unit, layers_of, units_of
from bmm.modules.watch import Observer, Reached, Watch
from bmm.regression.head_sums import HeadSums, output_head
from bmm.regression.moments import Moments, TaskSums
from bmm.regression.passes import Answers, Inputs, Step
from bmm.regression.stack import Stack, find_stack

SMALLEST_SCALE = 0.05
"""Where a layer scales a channel by less before adding it, the drift is not divided by it: noise would win."""


class Walk:
    """Merged model and experts, side by side, on their way through the network; for all tasks or some of them.

    Args:
        merged: an encoder for the model that is being solved.
        expert: another of the same architecture, for one expert at a time.
        names: the parameters that the merge is about, by canonical name; others stay as the encoders have them.
        prior: gives those of the model that the walk begins with, the anchor's.
        weight: `(task, name)` gives an expert's.
        batches: for each task, the inputs of the forward passes over its calibration rows.
        maps: the maps to regress, in firing order.
        held_out: for each task, how many of its batches, the last ones, hold rows that are kept out of the solve.
        sample: what is kept of each sequence's tokens; without, all.
        room: bytes of the experts' answers that are kept while a layer is solved; without, all. An answer that is not
            kept is asked for once a group, and is the same.
    """

    def __init__(
        self,
        merged: nn.Module,
        expert: nn.Module,
        names: Collection[str],
        prior: Give,
        weight: Callable[[int, str], Tensor],
        batches: Sequence[Sequence[Batch]],
        maps: Sequence[LinearMap],
        held_out: Sequence[int] | None = None,
        sample: Sample | None = None,
        room: int | None = None,
    ) -> None:
        self._merged = merged
        self._expert = expert
        self._of_merged = Resident(merged, names)
        self._of_expert = Resident(expert, names)
        self._prior = prior
        self._weight = weight
        self._tasks = [
            [Step(batch, Tokens(batch, sample, place)) for place, batch in enumerate(task)] for task in batches
        ]
        self._held_out = held_out
        self._room = math.inf if room is None else room
        self.units = units_of(maps)
        self._head = output_head(self.units)
        self._by_module = {map_.module: map_ for map_ in maps}
        self._unit_of = {map_.module: unit for unit in self.units for map_ in unit.maps}
        self._stack = self._find_stack()
        self._layers = self._stack.layers
        self._of_merged.surround(prior)
        self._inside = False
        # The layer whose weights the merged model has, and the unit that the experts were asked about last.
        self._here: str | None = None
        self._asked: str | None = None
        # The layer that the expert has, and whose.
        self._brought: tuple[str, int] | None = None

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers, if they are a chain; with none, every pass begins at the network's own beginning."""
        return self._layers

    def moments(self, unit: str, group: str) -> list[tuple[Moments, ...]]:
        """Return one group's moments for each task; groups of a unit are asked for in order, each solved by `apply`.

        Of all rows; where some are held out, then of the rows to solve on and of those held out.
        """
        place = next(found for found in self.units if found.name == unit)
        self._arrive(place)
        if self._asked != unit:
            self._ask_experts(place)
            self._asked = unit
        members = place.groups[group]
        found: list[tuple[Moments, ...]] = []
        for task, steps in enumerate(self._tasks):
            fit = self._sums(place, members)
            if self._held_out is None:
                for rows in self._rows_of(place, members, task):
                    fit.add(*rows)
                found.append((fit.moments(),))
                continue
            everything, held_out = (self._sums(place, members) for _ in range(2))
            last = len(steps) - self._held_out[task]
            for index, rows in enumerate(self._rows_of(place, members, task)):
                (fit if index < last else held_out).add(*rows)
            everything.include(fit)
            everything.include(held_out)
            found.append((everything.moments(), fit.moments(), held_out.moments()))
        return found

    def apply(self, module: str, solution: Tensor) -> None:
        """Give the merged model one map's solution, `[W b]` of shape `(out, in + 1)`, or `W` without bias."""
        self._arrive(self._unit_of[module])
        self._by_module[module].place(solution, self._merged.get_parameter)

    def advance(self, unit: str) -> None:
        """Carry the hidden states of all rows through a solved layer, in the merged model and in the experts."""
        place = next(found for found in self.units if found.name == unit)
        self._asked = None
        layer = self._layer(place)
        if layer is None:
            for steps in self._tasks:
                for step in steps:
                    step.forget()
            return
        self._arrive(place)
        merged = self._merged.get_submodule(layer)
        for task, steps in enumerate(self._tasks):
            if any(step.beyond is None for step in steps):
                self._bring_expert(place, task)
            for step in steps:
                if step.beyond is None:
                    # Under a watch, as answers are: without one, torch may add up fused attention in another order.
                    step.beyond = self._run(Observer(), self._expert, place, step, step.expert)
                with torch.inference_mode():
                    step.merged, _ = step.merged_calls[layer].through(merged, step.merged)
                if step.beyond is not None:
                    step.expert, step.beyond = step.beyond, None
                step.forget()
        for resident in (self._of_merged, self._of_expert):
            resident.drop(layer)
        self._here = self._brought = None

    def _of(self, task: int) -> Give:
        return lambda name: self._weight(task, name)

    def _arrive(self, unit: Unit) -> None:
        """Have the weights of a unit in the merged model: the prior's, until they are solved."""
        layer = self._layer(unit)
        if layer is not None and self._here != layer:
            self._enter()
            if self._here is not None:
                raise BMMError(f"the layer {self._here} was left before the walk had advanced through it")
            self._of_merged.bring(layer, self._prior)
            self._here = layer

    def _find_stack(self) -> Stack:
        if not self._tasks or not self._tasks[0]:
            return Stack()
        batch = {name: tensor[:2] for name, tensor in self._tasks[0][0].batch.items()}
        solved = {name for map_ in self._by_module.values() for name in map_.parameters}
        return find_stack(
            layers_of(self.units), self._of_merged, self._of_expert, self._prior, self._of(0), solved, batch
        )

    def _enter(self) -> None:
        """Find what reaches the first layer in the merged model and in the experts, once."""
        if self._inside:
            return
        first = self._layers[0]
        for task, steps in enumerate(self._tasks):
            self._of_expert.surround(self._of(task))
            for step in steps:
                found = self._stack.enter(self._of_expert, self._of(task), step.batch)
                step.expert = found[first].hidden
                step.expert_calls = {name: call.forget() for name, call in found.items()}
                found = self._stack.enter(self._of_merged, self._prior, step.batch)
                step.merged = found[first].hidden
                step.merged_calls = {name: call.forget() for name, call in found.items()}
        self._inside = True

    def _ask_experts(self, unit: Unit) -> None:
        """Let each expert run the unit on its own inputs; keep its answers, or the streams that they were added to.

        As many as there is room for; of an output head none, whose sums do without them.
        """
        if unit == self._head:
            return
        layer = self._layer(unit)
        room = self._room
        for task, steps in enumerate(self._tasks):
            self._bring_expert(unit, task)
            routed = {
                map_.module: map_.part(self._expert.get_parameter(map_.weight)).detach().clone()
                for map_ in unit.maps
                if map_.index is not None
            }
            for step in steps:
                step.routed = routed
                if room > 0:
                    self._ask(unit, unit.maps, task, step, to_the_end=layer is not None)
                    room -= step.nbytes

    def _bring_expert(self, unit: Unit, task: int) -> None:
        """Have the weights of a task's expert that a unit needs."""
        layer = self._layer(unit)
        if layer is None:
            self._of_expert.surround(self._of(task))
        elif self._brought != (layer, task):
            self._of_expert.bring(layer, self._of(task))
            self._brought = (layer, task)

    def _ask(self, unit: Unit, maps: Sequence[LinearMap], task: int, step: Step, *, to_the_end: bool) -> None:
        """Run one batch through a unit in its expert, which is there, and keep the answers of some maps."""
        seen = Answers(maps, to_the_end=to_the_end)
        with nullcontext() if self._layer(unit) is not None else self._of_expert.passing(self._of(task)):
            step.beyond = self._run(seen, self._expert, unit, step, step.expert)
        step.answers, step.totals, step.asked = seen.answers(), seen.totals(), True

    def _rows_of(self, unit: Unit, members: Sequence[LinearMap], task: int) -> Iterator[tuple[Tensor, Any]]:
        """Yield rows and targets of a task's batches; of an output head the expert's rows in place of targets.

        Answers that were not kept are asked for, a batch at a time.
        """
        if unit == self._head:
            self._bring_expert(unit, task)
            for step in self._tasks[task]:
                own = self._read(unit, members, self._of_expert, self._of(task), step)
                yield self._read(unit, members, self._of_merged, self._prior, step).inputs(), own.inputs()
            return
        answered = any(map_.index is None for map_ in members)
        here = False
        for step in self._tasks[task]:
            again = answered and not step.asked
            if again:
                if not here:
                    self._bring_expert(unit, task)
                    here = True
                self._ask(unit, members, task, step, to_the_end=False)
            yield self._rows(unit, members, step)
            if again:
                step.forget_answers()

    def _layer(self, unit: Unit) -> str | None:
        """Return the layer of the chain that a unit is, or None."""
        return unit.prefix if unit.prefix in self._layers else None

    def _rows(self, unit: Unit, members: Sequence[LinearMap], step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the merged model's rows `(rows, in)` at a group, and the targets `(rows, out)` of its maps."""
        seen = self._read(unit, members, self._of_merged, self._prior, step)
        inputs = seen.inputs()
        targets = {}
        for map_ in members:
            name = map_.module
            if map_.index is not None:
                targets[name] = inputs @ step.routed[name].to(inputs.dtype).T
            elif name in step.totals:
                target = step.totals[name] - seen.stream(map_)
                if map_.scale is not None:
                    scale = self._merged.get_parameter(map_.scale).detach()
                    target = torch.where(scale.abs() < SMALLEST_SCALE, step.answers[name], target / scale)
                targets[name] = target
            else:
                targets[name] = step.answers[name]
        return inputs, targets

    def _read(self, unit: Unit, members: Sequence[LinearMap], resident: Resident, give: Give, step: Step) -> Inputs:
        """Run one batch through a unit, up to what a group reads."""
        seen = Inputs(members)
        hidden = step.merged if resident is self._of_merged else step.expert
        with nullcontext() if self._layer(unit) is not None else resident.passing(give):
            self._run(seen, resident.encoder, unit, step, hidden)
        return seen

    def _sums(self, unit: Unit, members: Sequence[LinearMap]) -> Any:
        """Return what adds up the rows that `_rows_of` yields."""
        return HeadSums(members, self._expert.get_parameter) if unit == self._head else TaskSums(members)

    def _run(self, observer: Observer, encoder: nn.Module, unit: Unit, step: Step, hidden: Tensor) -> Tensor | None:
        """Run one unit under a watch; None if the pass was ended early or the unit is no layer of a chain."""
        watch = Watch(encoder, observer, step.tokens)
        try:
            with torch.inference_mode():
                if (layer := self._layer(unit)) is not None:
                    known = step.merged_calls if encoder is self._merged else step.expert_calls
                    with watch:
                        output, _ = known[layer].through(encoder.get_submodule(layer), hidden)
                    return output
                # What comes before the layers has not been entered yet, what comes after them needs their outcome.
                skipped = self._layers if self._inside else ()
                with given(encoder, skipped, hidden, self._stack.tuple_size), watch:
                    encoder(**step.batch)
        except Reached:
            pass
        return None
