"""Stage 7, publish: the merged model as an ordinary Hugging Face folder, inside the store.

Weights, configuration, what reads the rows (tokenizer, image processor) and one head a task. Putting it where the user
wants it, with the card and the report, is `bmm.publication`: that is an effect on somebody's disk and happens on
every run.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from bmm.checkpoint.architecture import encoder_names
from bmm.checkpoint.layout import dotted
from bmm.checkpoint.reader import Checkpoint
from bmm.checkpoint.tensors import TensorInfo, dtype_name, torch_dtype
from bmm.checkpoint.vocabulary import with_vocabulary
from bmm.checkpoint.writer import write_weights
from bmm.kinds.registry import kind_of
from bmm.prediction import StoredWeights, head_tensors
from bmm.sizes import parse_bytes
from bmm.sources import Model
from bmm.stages.anchor import published_dtypes
from bmm.stages.request import Request, Work
from bmm.stages.search import DTYPES
from bmm.stages.setup import Setup, setup_of
from bmm.store import Draft, Reference

# What a configuration says of labels and heads; the merged encoder has neither.
_HEAD_KEYS = ("id2label", "label2id", "num_labels", "problem_type", "classifier_dropout", "finetuning_task")


def publish(work: Work, request: Request) -> dict[str, Any]:
    """Put the merged model together as a folder that `AutoModel.from_pretrained` loads."""
    setup = setup_of(work, request)

    def make(draft: Draft) -> None:
        with ExitStack() as stack:
            base = stack.enter_context(setup.base.open())
            _write_weights(work, request, setup, base, draft.path)
            architecture = work.read(request.inputs["layout"]).read_json("modules.json")["architecture"]
            dtype = request.settings["dtype"]
            draft.write_json("config.json", _config(setup, base.config, architecture, dtype))
            _copy_support(base, setup.experts[0].model, draft.path)
            for expert in setup.experts:
                checkpoint = stack.enter_context(expert.model.open())
                artefact = work.read(request.inputs["experts"][expert.name])
                head = head_tensors(checkpoint, setup.layout, expert.name, artefact)
                if not head:
                    continue
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


def _write_weights(work: Work, request: Request, setup: Setup, base: Checkpoint, folder: Path) -> None:
    merged = StoredWeights(work.read(Reference.from_json(request.inputs["search"])))
    wanted = DTYPES[request.settings["dtype"]]
    dtypes = published_dtypes(setup, wanted)
    kept, prefix = _kept(setup, base)
    # As the base's own file calls them, which is what every version of transformers reads.
    shared = {parameter.base_key.removeprefix(prefix): parameter for parameter in setup.layout.shared}
    by_name = {parameter.name: parameter for parameter in setup.layout.shared}
    # What the base stores twice because it is tied, its output stores twice.
    shared |= {stored.removeprefix(prefix): by_name[name] for stored, name in setup.layout.copies.items()}
    infos = [
        TensorInfo(name, parameter.shape, dtype_name(dtypes[parameter.name])) for name, parameter in shared.items()
    ]
    for name, key in kept.items():
        info = base.info(key)
        infos.append(TensorInfo(name, info.shape, wanted if wanted and info.is_float else info.dtype))
    infos.sort(key=lambda info: info.name)
    written = {info.name: torch_dtype(info.dtype) for info in infos}

    def get(name: str) -> Tensor:
        return base.tensor(kept[name]).to(written[name]) if name in kept else merged(shared[name].name)

    write_weights(folder, infos, get, parse_bytes(request.settings["max_shard_size"]))


def _kept(setup: Setup, base: Checkpoint) -> tuple[dict[str, str], str]:
    """Return what is published as the base has it (published name -> stored name), and the prefix that is left out."""
    if _tower(setup):
        # The merged tower goes back into the whole model, whose other parts no expert has changed.
        merged = {parameter.base_key for parameter in setup.layout.shared}
        return {key: key for key in base.names() if key not in merged}, ""
    prefix = dotted(setup.layout.prefix)
    # An encoder weight that no expert has (a pooler that their heads do without) stays the base's.
    return {
        key.removeprefix(prefix): key
        for key in encoder_names(base, setup.layout.prefix).values()
        if key in setup.layout.dropped and base.info(key).is_float
    }, prefix


def _tower(setup: Setup) -> bool:
    return kind_of(setup.experts[0].task["kind"]).architecture.tower is not None


def _config(setup: Setup, config: dict[str, Any], architecture: str, dtype: str) -> dict[str, Any]:
    kept = {name: value for name, value in config.items() if name not in _HEAD_KEYS and not name.startswith("_")}
    if dtype != "base":
        kept.pop("torch_dtype", None)
        kept["dtype"] = dtype
    return kept if _tower(setup) else {**kept, "architectures": [architecture]}


def _head_config(config: dict[str, Any], labels: Sequence[str]) -> dict[str, Any]:
    """Return the expert's configuration, with the class names by which it was measured."""
    named = {"id2label": {str(index): name for index, name in enumerate(labels)}} if labels else {}
    return {**config, **named}


def _copy_support(base: Checkpoint, fallback: Model, folder: Path) -> None:
    """Copy the base's tokenizer or image processor; where it has none, the first expert's."""
    files = base.tokenizer_files
    if not files:
        with fallback.open() as expert:
            files = expert.tokenizer_files
    for path in files:
        shutil.copyfile(path, folder / path.name)
