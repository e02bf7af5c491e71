"""Stage 7, publish: the merged model as an ordinary Hugging Face folder, inside the store.

Weights, configuration, what reads the rows (tokenizer, image processor) and one head a task. Putting it where the user
wants it, with the card and the report, is `bmm.publication`: that is an effect on somebody's disk and happens on
every run.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from bmm.checkpoint.architecture import encoder_names
from bmm.checkpoint.conversion import Conversion
from bmm.checkpoint.layout import dotted
from bmm.checkpoint.reader import Checkpoint
from bmm.checkpoint.tensors import TensorInfo, dtype_name, torch_dtype
from bmm.checkpoint.vocabulary import with_vocabulary
from bmm.checkpoint.writer import write_weights
from bmm.kinds.registry import kind_of
from bmm.prediction import StoredWeights, head_tensors
from bmm.sizes import parse_bytes
from bmm.sources import Model
from bmm.stages.alone import anchor_alone
from bmm.stages.anchor import published_dtypes
from bmm.stages.heads import Heads, heads_in, rounded
from bmm.stages.objective import DTYPES
from bmm.stages.request import COVERAGE, Request, Work
from bmm.stages.setup import Setup, setup_of
from bmm.store import Draft, Reference
from bmm.threads import one_thread

# What a configuration says of labels and heads; the merged encoder has neither.
_HEAD_KEYS = ("id2label", "label2id", "num_labels", "problem_type", "classifier_dropout", "finetuning_task")

_Tensor = tuple[TensorInfo, Callable[[], Tensor]]


def publish(work: Work, request: Request) -> dict[str, Any]:
    """Put the merged model together as a folder that `AutoModel.from_pretrained` loads."""
    setup = setup_of(work, request)

    def make(draft: Draft) -> None:
        with ExitStack() as stack:
            base = stack.enter_context(setup.base.open())
            dtypes = published_dtypes(setup, DTYPES[request.settings["dtype"]])
            heads: Heads = {}
            if (search := request.inputs.get("search")) is not None:
                found = work.read(Reference.from_json(search))
                merged, heads = StoredWeights(found), heads_in(found.path)
                _write_weights(request, setup, base, draft.path, merged, dtypes)
            else:
                threads = torch.get_num_threads()
                with one_thread(), anchor_alone(request, setup, dtypes) as alone:
                    _write_weights(request, setup, base, draft.path, alone, dtypes, threads)
                    draft.provenance[COVERAGE] = alone.coverage()
            architecture = work.read(request.inputs["layout"]).read_json("modules.json")["architecture"]
            dtype = request.settings["dtype"]
            draft.write_json("config.json", _config(setup, base.config, architecture, dtype))
            half = DTYPES[request.settings.get("head_dtype", "base")]
            _copy_support(base, setup.experts[0].model, draft.path)
            for expert in setup.experts:
                checkpoint = stack.enter_context(expert.model.open())
                artefact = work.read(request.inputs["experts"][expert.name])
                head = {**head_tensors(checkpoint, setup.layout, expert.name, artefact), **heads.get(expert.name, {})}
                if not head:
                    continue
                if half is not None:
                    head = rounded(head, torch_dtype(half))
                (draft.path / "heads").mkdir(exist_ok=True)
                # One entry only: safetensors writes several in a random order.
                config = _head_config(checkpoint.config, artefact.read_json("expert.json")["labels"])
                if setup.layout.vocabulary is not None:
                    config = with_vocabulary(config, setup.layout.vocabulary)
                metadata = {"config": json.dumps(config, sort_keys=True)}
                save_file(head, draft.path / "heads" / f"{expert.name}.safetensors", metadata=metadata)
                if expert.name in setup.layout.tokenizers:
                    (draft.path / "heads" / expert.name).mkdir()
                    for file in checkpoint.tokenizer_files:
                        shutil.copyfile(file, draft.path / "heads" / expert.name / file.name)

    inputs = {**request.inputs, "base": setup.base.digest}
    return {"model": work.obtain("model", inputs, make, settings=dict(request.settings)).to_json()}


def _write_weights(
    request: Request,
    setup: Setup,
    base: Checkpoint,
    folder: Path,
    merged: Callable[[str], Tensor],
    dtypes: Mapping[str, torch.dtype],
    threads: int = 1,
) -> None:
    """Write the weights, asking `merged` for every shared parameter by canonical name, from so many threads."""
    wanted = DTYPES[request.settings["dtype"]]
    kept, prefix = _kept(setup, base)
    by_key = {parameter.base_key: parameter for parameter in setup.layout.shared}
    by_name = {parameter.name: parameter for parameter in setup.layout.shared}
    # As the base's own file has them, which is what every version of transformers reads. What the base stores twice
    # because it is tied, its output stores twice.
    tensors: dict[str, _Tensor] = {}
    for key, parameter in [*by_key.items(), *((key, by_name[name]) for key, name in setup.layout.copies.items())]:
        conversion, dtype = base.conversion(key), dtypes[parameter.name]
        if conversion is not None and conversion.loaded.keys() <= by_key.keys() and conversion.reversible:
            if key == next(iter(conversion.loaded)):
                tensors |= _as_stored(conversion, lambda key: merged(by_key[key].name), dtype)
        else:
            info = TensorInfo(key, parameter.shape, dtype_name(dtype))
            tensors[key] = (info, partial(merged, parameter.name))
    tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    for name, key in kept.items():
        info = base.info(key)
        info = replace(info, dtype=wanted if wanted and info.is_float else info.dtype)
        tensors[name] = (info, partial(_kept_tensor, base, info))
    infos = [replace(info, name=name) for name, (info, _) in sorted(tensors.items())]
    largest = parse_bytes(request.settings["max_shard_size"])
    write_weights(folder, infos, lambda name: tensors[name][1](), largest, threads)


def _kept_tensor(base: Checkpoint, info: TensorInfo) -> Tensor:
    return base.tensor(info.name).to(torch_dtype(info.dtype))


def _as_stored(conversion: Conversion, get: Callable[[str], Tensor], dtype: torch.dtype) -> dict[str, _Tensor]:
    """Return the tensors that loaded ones are stored as, which are all computed with the first that is asked for."""
    left: dict[str, Tensor] = {}
    lock = Lock()

    def take(name: str) -> Tensor:
        with lock:
            if not left:
                left.update(conversion.store(get))
            return left.pop(name)

    return {
        name: (replace(info, dtype=dtype_name(dtype)), partial(take, name)) for name, info in conversion.stored.items()
    }


def _kept(setup: Setup, base: Checkpoint) -> tuple[dict[str, str], str]:
    """Return what is published as the base has it (published name -> stored name), and the prefix that is left out."""
    if _is_part(setup, base.config):
        # The merged part goes back into the whole model, whose other parts no expert has changed.
        merged = {parameter.base_key for parameter in setup.layout.shared}
        return {key: key for key in base.names() if key not in merged}, ""
    prefix = dotted(setup.layout.prefix)
    # An encoder weight that no expert has (a pooler that their heads do without) stays the base's.
    return {
        key.removeprefix(prefix): key
        for key in encoder_names(base, setup.layout.prefix).values()
        if key in setup.layout.dropped and base.info(key).is_float
    }, prefix


def _is_part(setup: Setup, config: dict[str, Any]) -> bool:
    return any(kind_of(expert.task["kind"]).architecture.is_part(config) for expert in setup.experts)


def _config(setup: Setup, config: dict[str, Any], architecture: str, dtype: str) -> dict[str, Any]:
    kept = {name: value for name, value in config.items() if name not in _HEAD_KEYS and not name.startswith("_")}
    if dtype != "base":
        kept.pop("torch_dtype", None)
        kept["dtype"] = dtype
    return kept if _is_part(setup, config) else {**kept, "architectures": [architecture]}


def _head_config(config: dict[str, Any], labels: Sequence[str]) -> dict[str, Any]:
    """Return the expert's configuration, with the class names by which it was measured, without where it came from."""
    named = {"id2label": {str(index): name for index, name in enumerate(labels)}} if labels else {}
    return {**{name: value for name, value in config.items() if not name.startswith("_")}, **named}


def _copy_support(base: Checkpoint, fallback: Model, folder: Path) -> None:
    """Copy the base's tokenizer or image processor; where it has none, the first expert's."""
    files = base.tokenizer_files
    if not files:
        with fallback.open() as expert:
            files = expert.tokenizer_files
    for path in files:
        shutil.copyfile(path, folder / path.name)
