"""Stage 1, load experts: checkpoints compared, linear maps found, rows read, checked and copied."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors.torch import save_file

from bmm.checkpoint.comparison import compare
from bmm.checkpoint.reader import Checkpoint
from bmm.evaluation.model import TaskModel
from bmm.kinds.interface import Kind
from bmm.kinds.registry import kind_of
from bmm.kinds.settings import Task
from bmm.modules.linear import discover
from bmm.prediction import HEAD, build_model
from bmm.progress import progress
from bmm.sources import Expert, Model, require_unchanged
from bmm.stages.request import Request, Work
from bmm.stages.setup import open_all
from bmm.store import Draft


def load_experts(work: Work, request: Request) -> dict[str, Any]:
    """Compare the checkpoints, find the linear maps, and take a copy of every row that will be used.

    Raises:
        UserError: checkpoints that do not fit together, rows that cannot be used, splits that overlap.
    """
    base = Model(**request.where["base"])
    experts = [Expert.from_json(value) for value in request.where["experts"]]
    with ExitStack() as stack:
        base_checkpoint = stack.enter_context(base.open())
        checkpoints = open_all(stack, experts)

        def make_layout(draft: Draft) -> None:
            architectures = {expert.name: kind_of(expert.task["kind"]).architecture for expert in experts}
            layout = compare(base_checkpoint, checkpoints, architectures)
            draft.write_json("layout.json", layout.to_json())
            draft.write_json("base.json", {"license": base_checkpoint.license})
            first = experts[0]
            model = build_model(checkpoints[first.name], first, 1, layout)
            draft.write_json("modules.json", _modules(kind_of(first.task["kind"]), model))

        digests = {expert.name: [expert.model.digest, expert.task["kind"]] for expert in experts}
        layout = work.obtain("layout", {"base": base.digest, "experts": digests}, make_layout)
        references = {}
        with progress("reading rows", len(experts)) as bar:
            for expert, source in zip(experts, request.where["tasks"], strict=True):
                references[expert.name] = _expert_artefact(
                    work, expert, source, request, checkpoints[expert.name], base_checkpoint, base.digest
                )
                bar.advance()
    return {"layout": layout.to_json(), "experts": references}


def _expert_artefact(
    work: Work,
    expert: Expert,
    source: Mapping[str, Any],
    request: Request,
    checkpoint: Checkpoint,
    base: Checkpoint,
    base_digest: str,
) -> dict[str, str]:
    task = TypeAdapter[Any](Task).validate_python(source)
    kind = kind_of(task.kind)

    def make(draft: Draft) -> None:
        labels = kind.labels(checkpoint, task)
        splits = {
            name: kind.load_split(
                split, task, labels, Path(request.where["folder"]), f"the expert {expert.name}, {name}"
            )
            for name, split in task.splits().items()
        }
        require_unchanged(expert, task, Path(request.where["folder"]))
        kind.check_splits(f"the expert {expert.name}", splits)
        for name, split in splits.items():
            kind.write_split(split, draft.path, name)
        head = kind.make_head(base, task, f"the expert {expert.name}")
        if head is not None:
            save_file(head, draft.path / HEAD)
        draft.write_json(
            "expert.json",
            {
                "kind": kind.name,
                "labels": list(labels),
                "license": checkpoint.license,
                "trained_on": checkpoint.trained_on,
                "splits": {name: {"rows": len(split.rows), "digest": split.digest} for name, split in splits.items()},
            },
        )

    inputs = {"model": expert.model.digest, "task": expert.task, "data": expert.data}
    if kind.architecture.tower is not None:
        inputs["base"] = base_digest
    return work.obtain("expert", inputs, make).to_json()


def _modules(kind: Kind, model: TaskModel) -> dict[str, Any]:
    maps = discover(model.encoder, model.completed(kind.probe(model)))
    embeddings = [
        f"{name}.weight" for name, module in model.encoder.named_modules() if isinstance(module, torch.nn.Embedding)
    ]
    return {
        "maps": [map_.to_json() for map_ in maps],
        "embeddings": sorted(embeddings),
        "architecture": type(model.encoder).__name__,
    }
