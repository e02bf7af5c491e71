"""Stage 4, anchor: the experts merged by a published method, the prior mean of the regression."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from bmm.anchors.interface import Sources
from bmm.anchors.pieces import merge_tensor
from bmm.anchors.registry import build as build_anchor
from bmm.anchors.settings import AnchorSettings, FisherSettings, ScaledSettings
from bmm.anchors.task_vectors import ScaledAnchor
from bmm.checkpoint.canonical import canonical_names
from bmm.checkpoint.tensors import TensorInfo, dtype_name, is_float, torch_dtype
from bmm.checkpoint.writer import MAX_SHARD_BYTES, write_weights
from bmm.digest import digest_json
from bmm.errors import BMMError, CheckpointError
from bmm.evaluation.metrics import mean_ratio_to_expert
from bmm.grams.store import GramReader
from bmm.prediction import StoredWeights
from bmm.progress import progress
from bmm.sources import Model
from bmm.stages.fishers import fisher_artefacts
from bmm.stages.panel import expert_predictions, panel_of
from bmm.stages.request import Request, Work, version_of
from bmm.stages.setup import Setup, setup_of
from bmm.store import Draft, Reference
from bmm.weights import require_finite

_SCALE = "scale.json"


def anchor(work: Work, request: Request) -> dict[str, Any]:
    """Merge by the recipe's anchor method: the prior mean of the regression."""
    setup = setup_of(work, request)
    explicit = Model(**request.where["anchor"]) if request.where["anchor"] else None
    said = {**request.settings["anchor"], **({"path": explicit.source} if explicit else {})}
    settings: AnchorSettings = TypeAdapter(AnchorSettings).validate_python(said)
    return {"anchor": anchor_artefact(work, request, setup, settings, explicit).to_json()}


def anchor_artefact(
    work: Work, request: Request, setup: Setup, settings: AnchorSettings, explicit: Model | None = None
) -> Reference:
    """Return the artefact of one anchor method: float32 weights by canonical name, and each one's treatment.

    Args:
        work: the way to the store.
        request: with the experts' Grams or rows among its inputs, where the method needs them.
        setup: the merge.
        settings: the method.
        explicit: the checkpoint, if that is the method.
    """
    fishers = fisher_artefacts(work, request, setup, settings) if isinstance(settings, FisherSettings) else []
    grams = [request.inputs["grams"][expert.name] for expert in setup.experts] if settings.needs == "gram" else []
    inputs: dict[str, Any] = {
        "base": setup.base.digest,
        "experts": [expert.model.digest for expert in setup.experts],
        "parameters": [parameter.name for parameter in setup.layout.shared],
        "linear": [[map_.module, *vars(map_.site).values()] for map_ in setup.matrices],
        "checkpoint": explicit.digest if explicit else None,
        "grams": [gram["digest"] for gram in grams],
        "fishers": [fisher.digest for fisher in fishers],
    }

    if isinstance(settings, ScaledSettings) and settings.chooses_scale:
        return _at_the_best_scale(work, request, setup, settings, inputs)

    def make(draft: Draft) -> None:
        with ExitStack() as stack:
            weights = stack.enter_context(setup.weights())
            sources = Sources(
                checkpoint=checkpoint_reader(stack, setup, explicit, "the anchor checkpoint") if explicit else None,
                gram=_gram_reader(work, setup, grams) if grams else None,
                fisher=_fisher_reader(work, fishers) if fishers else None,
            )
            method = build_anchor(settings, sources)
            method.prepare(weights)
            treatments: dict[str, str] = {}
            with progress(f"merging by {settings.method}", len(weights.names())) as bar:

                def merge(name: str) -> torch.Tensor:
                    dtype = torch.float32 if is_float(weights.parameter(name).dtype) else weights.base(name).dtype
                    tensor, treatments[name] = merge_tensor(method, name, weights, dtype)
                    bar.advance()
                    return tensor

                write_state(draft.path, setup, merge, dtype="F32")
            draft.write_json("treatments.json", treatments)

    return work.obtain("anchor", inputs, make, settings=settings.said(), version=version_of("anchor"))


def chosen_scale(work: Work, anchor: Reference | Mapping[str, str]) -> float | None:
    """Return the scale that was chosen on the validation rows for an anchor, or None if none was."""
    path = work.read(anchor).path / _SCALE
    return float(json.loads(path.read_text(encoding="utf-8"))["scale"]) if path.exists() else None


def _at_the_best_scale(
    work: Work, request: Request, setup: Setup, settings: ScaledSettings, inputs: Mapping[str, Any]
) -> Reference:
    """Return the artefact of `W_0 + s · direction`, with the `s` of the recipe's that is best on the validation rows.

    Best is what the search maximises: the mean over tasks of the merged model's metric over its expert's. It equals
    the anchor of that very scale but for the direction's own rounding to float32.
    """
    direction = _direction_artefact(work, setup, settings, inputs)

    def make(draft: Draft) -> None:
        stored = work.read(direction)
        directions = StoredWeights(stored)
        panel = panel_of(work, request, setup)
        with setup.weights() as weights:

            def scaled(name: str, scale: float) -> torch.Tensor:
                base = weights.base(name)
                if not base.is_floating_point():
                    return base
                return (base.to(torch.float64) + scale * directions(name).to(torch.float64)).to(torch.float32)

            def state(scale: float) -> dict[str, torch.Tensor]:
                return {name: scaled(name, scale) for name in weights.names()}

            tried: list[dict[str, Any]] = []
            experts = {
                task: measured.score for task, measured in expert_predictions(setup, panel, "validation").items()
            }
            for scale in settings.scales:
                # Answers are artefacts of their own, so that a killed choice goes on where it stopped.
                known_as = digest_json({"direction": direction.digest, "scale": scale})
                what = f"{request.stage}: scale {scale:g}"
                found = panel.predictions(known_as, partial(state, scale), panel.tasks, "validation", what)
                scores = {task: measured.score for task, measured in found.items()}
                tried.append({"scale": scale, "objective": mean_ratio_to_expert(scores, experts), "tasks": scores})
            best = max(tried, key=lambda trial: float(trial["objective"]))
            write_state(draft.path, setup, lambda name: scaled(name, best["scale"]), dtype="F32")
        draft.write_json("treatments.json", stored.read_json("treatments.json"))
        draft.write_json(_SCALE, {"scale": best["scale"], "tried": tried})

    # By key as well as by digest: the metric, and how rows are read, are not among the bytes of the rows.
    rows = {expert.name: request.inputs["experts"][expert.name] for expert in setup.experts}
    chosen = {**inputs, "direction": direction.digest, "rows": rows}
    said = {**settings.said(), "batch_size": request.settings["batch_size"]}
    return work.obtain("anchor", chosen, make, settings=said, version=version_of("anchor"))


def _direction_artefact(work: Work, setup: Setup, settings: ScaledSettings, inputs: Mapping[str, Any]) -> Reference:
    """Return the artefact of a method's direction: what it would add to the base at the scale 1, float32."""

    def make(draft: Draft) -> None:
        method = build_anchor(TypeAdapter(AnchorSettings).validate_python(settings.at(1.0).model_dump()))
        if not isinstance(method, ScaledAnchor):
            raise BMMError(f"{type(method).__name__} has no direction apart from its scale")
        treatments: dict[str, str] = {}
        with setup.weights() as weights, progress("merging towards a direction", len(weights.names())) as bar:
            method.prepare(weights)

            def get(name: str) -> torch.Tensor:
                base = weights.base(name)
                direction, treatment = method.direction(name, weights) if base.is_floating_point() else (None, "copied")
                treatments[name] = "copied" if direction is None else treatment
                bar.advance()
                return torch.zeros_like(base) if direction is None else direction

            write_state(draft.path, setup, get, dtype="F32")
        draft.write_json("treatments.json", treatments)

    said = settings.model_dump(mode="json", exclude={"scale", "scales"})
    return work.obtain("direction", dict(inputs), make, settings=said, version=version_of("anchor"))


def _gram_reader(work: Work, setup: Setup, grams: Sequence[Mapping[str, str]]) -> Callable[[int, str], torch.Tensor]:
    readers = [GramReader(work.read(gram).file("grams.zarr")) for gram in grams]
    group_of = {map_.module: map_.input_group for map_ in setup.regressed}
    return lambda index, name: readers[index].gram(group_of[name])


def _fisher_reader(work: Work, fishers: Sequence[Reference]) -> Callable[[int, str], torch.Tensor]:
    stored = [StoredWeights(work.read(fisher)) for fisher in fishers]
    return lambda index, name: stored[index](name)


def checkpoint_reader(stack: ExitStack, setup: Setup, model: Model, what: str) -> Callable[[str], torch.Tensor]:
    """Return a reader of the shared parameters in any checkpoint of the base's architecture.

    Raises:
        CheckpointError: it lacks one, or has one of another shape; when read, one is not finite.
    """
    checkpoint = stack.enter_context(model.open())
    keys, _ = canonical_names(checkpoint, setup.layout.prefix, setup.layout.tied)
    for parameter in setup.layout.shared:
        if parameter.name not in keys:
            raise CheckpointError(
                f"{what} {model.path} lacks the tensor {parameter.name}; name a model of the base's architecture"
            )
        shape = checkpoint.info(keys[parameter.name]).shape
        if shape != parameter.shape:
            raise CheckpointError(
                f"{what} {model.path} has {parameter.name} of shape {shape}, the base of shape "
                f"{parameter.shape}; name a model of the base's architecture"
            )

    def read(name: str) -> torch.Tensor:
        tensor = checkpoint.tensor(keys[name])
        require_finite(tensor, checkpoint, keys[name])
        return tensor

    return read


def write_state(
    folder: Path,
    setup: Setup,
    get: Callable[[str], torch.Tensor],
    *,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[Path]:
    """Write the shared parameters under their canonical names, floating-point ones in `dtype` (None: the base's)."""
    dtypes = published_dtypes(setup, dtype)
    infos = [
        TensorInfo(parameter.name, parameter.shape, dtype_name(dtypes[parameter.name]))
        for parameter in setup.layout.shared
    ]
    return write_weights(folder, infos, lambda name: get(name).to(dtypes[name]), max_shard_bytes)


def published_dtypes(setup: Setup, dtype: str | None) -> dict[str, torch.dtype]:
    """Return each shared parameter's dtype: `dtype` (safetensors' word) for floating-point ones, else the base's."""
    return {
        parameter.name: torch_dtype(dtype if dtype and is_float(parameter.dtype) else parameter.dtype)
        for parameter in setup.layout.shared
    }
