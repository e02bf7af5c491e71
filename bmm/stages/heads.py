"""The experts' heads fitted to a merged encoder, as files beside its weights; part of the search stage.

What is fitted is `bmm.regression.head`; a head that is not there, because it was not to be fitted or has no last layer
of its own, stays the expert's. Where the recipe asks for half precision all heads are rounded as the encoder is, before
anything is measured with them. An encoder that does not fit into `cluster.memory_limit` has one layer in memory at a
time, read anew for each batch; the bytes are the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bmm.cluster.settings import ClusterSettings
from bmm.digest import digest_files
from bmm.errors import CheckpointError
from bmm.evaluation.head import last_layer, layers_outside, rows_at
from bmm.evaluation.labels import only_numbered
from bmm.evaluation.model import TaskModel
from bmm.grams.memory import whole_bytes
from bmm.modules.residence import Give, Resident
from bmm.modules.units import layers_of, units_of
from bmm.prediction import StoredWeights, build_model, head_tensors, read_split
from bmm.progress import progress
from bmm.regression.head import fitted_head
from bmm.sizes import parse_bytes
from bmm.sources import Expert
from bmm.stages.request import Request, Work
from bmm.stages.setup import Setup
from bmm.store import Artefact, Draft
from bmm.threads import one_thread
from bmm.weights import ExpertWeights

FOLDER = "heads"

Heads = Mapping[str, Mapping[str, Tensor]]
"""Expert -> the tensors of its head that are not the expert's own, by their names in its model."""


def write_heads(draft: Draft, work: Work, request: Request, setup: Setup, lam: float) -> dict[str, str | None]:
    """Fit the heads to the encoder that stands in the draft, and put them beside it.

    Returns:
        by expert, the name of the layer that was fitted, None where its head has none.
    """
    merged = StoredWeights.of(draft.path)
    layers: dict[str, str | None] = {}
    limit = parse_bytes(ClusterSettings.model_validate(request.where["cluster"]).memory_limit)
    whole = whole_bytes(sum(math.prod(parameter.shape) for parameter in setup.layout.shared), ()) <= limit
    # The bytes must not depend on how many threads a machine has.
    with one_thread(), setup.weights() as weights, progress("fitting heads", len(setup.experts)) as bar:
        for index, expert in enumerate(setup.experts):
            artefact = work.read(request.inputs["experts"][expert.name])
            model = _model(setup, expert, artefact, request.settings["batch_size"])
            fitted: dict[str, Tensor] = {}
            if layers_outside(model):
                fitted = _fitted(model, setup, weights, index, merged, artefact, lam, whole=whole)
            layers[expert.name] = next((name.rpartition(".")[0] for name in fitted), None)
            if fitted:
                (draft.path / FOLDER).mkdir(exist_ok=True)
                save_file(fitted, draft.path / FOLDER / f"{expert.name}.safetensors")
            bar.advance()
    return layers


def round_heads(draft: Draft, work: Work, request: Request, setup: Setup, dtype: torch.dtype) -> None:
    """Put every expert's head beside the encoder that stands in the draft, rounded; fitted layers are rounded too."""
    fitted = heads_in(draft.path)
    for expert in setup.experts:
        artefact = work.read(request.inputs["experts"][expert.name])
        with expert.model.open() as checkpoint:
            own = head_tensors(checkpoint, setup.layout, expert.name, artefact)
            head = rounded({**own, **fitted.get(expert.name, {})}, dtype)
            if head:
                (draft.path / FOLDER).mkdir(exist_ok=True)
                save_file(head, draft.path / FOLDER / f"{expert.name}.safetensors")


def rounded(head: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return a head with its floating-point tensors in another dtype."""
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in head.items()}


def heads_in(folder: Path) -> Heads:
    """Return the heads that stand in a folder's `heads`, none if there is no such folder."""
    return {file.stem: load_file(file) for file in sorted((folder / FOLDER).glob("*.safetensors"))}


def digest_of_heads(folder: Path) -> str | None:
    """Return one digest of the heads in a folder, None if there are none."""
    files = sorted((folder / FOLDER).glob("*.safetensors"))
    return digest_files((file.name, file) for file in files) if files else None


def orders_in(folder: Path, wanted: Mapping[str, Sequence[str]], source: str) -> dict[str, list[int]]:
    """Return the ids that an expert's classes have in a published head, for heads that have them in another order.

    Args:
        folder: a merge's output.
        wanted: by expert, the names of its classes in order; none where it has no classes.
        source: what the folder is called in messages.

    Raises:
        CheckpointError: a head is of other classes.
    """
    orders = {}
    for expert, names in wanted.items():
        known = _classes(folder / FOLDER / f"{expert}.safetensors")
        if not (names and known) or list(names) == known:
            continue
        same = len(names) == len(known)
        if same and sorted(names) == sorted(known) and len(set(names)) == len(names):
            orders[expert] = [known.index(name) for name in names]
        elif not same or not (only_numbered(names) or only_numbered(known)):
            raise CheckpointError(
                f"the head '{expert}' in {source} is of the classes {', '.join(known)}, but the recipe's expert of "
                f"{', '.join(names)}; measure it with the recipe that it was merged by, or merge again"
            )
    return orders


def _classes(file: Path) -> list[str]:
    """Return the class names that a published head says, none where it says nothing."""
    if not file.is_file():
        return []
    with safe_open(file, framework="pt") as handle:
        named = json.loads((handle.metadata() or {}).get("config", "{}")).get("id2label") or {}
    return [named[index] for index in sorted(named, key=int)]


def _model(setup: Setup, expert: Expert, artefact: Artefact, batch_size: int) -> TaskModel:
    """Return an expert's model with its head and without its encoder's weights."""
    with expert.model.open() as checkpoint:
        model = build_model(checkpoint, expert, batch_size, setup.layout)
        model.load_head(head_tensors(checkpoint, setup.layout, expert.name, artefact))
    return model


def _fitted(
    model: TaskModel,
    setup: Setup,
    weights: ExpertWeights,
    index: int,
    merged: Give,
    artefact: Artefact,
    lam: float,
    *,
    whole: bool,
) -> dict[str, Tensor]:
    """Return the tensors of an expert's last layer, fitted; none where its head has no such layer."""

    def own(name: str) -> Tensor:
        return weights.expert(index, name)

    prepared = model.prepare(read_split(artefact, "calibration").rows)
    # Older checkpoints hold buffers, position ids say, that the model computes itself.
    names = set(weights.names()).intersection(model.encoder_names())
    model.expect_encoder(names, own)
    resident = Resident(model.encoder, names)
    if whole or not resident.divide(layers_of(units_of(setup.regressed))):
        resident.divide(())
    resident.surround(own)
    with resident.passing(own):
        name = last_layer(model, prepared)
        if name is None:
            return {}
        _, answers = rows_at(model, name, prepared)
    resident.surround(merged)
    with resident.passing(merged):
        inputs, _ = rows_at(model, name, prepared)
    layer: Any = model.module.get_submodule(name)
    solution = fitted_head(inputs, answers, layer.weight, layer.bias, lam)
    if layer.bias is None:
        return {f"{name}.weight": solution.contiguous()}
    return {f"{name}.weight": solution[:, :-1].contiguous(), f"{name}.bias": solution[:, -1].contiguous()}
