"""Other projects' own code on the same experts, kept in the same store: mergekit's command, fusion-bench's functions.

They are given encoders without heads, in folders as `save_pretrained` writes them: heads differ in their classes. What
each is asked for stands in `benchmarks.rows`; how it is called, in `peers`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, Literal

from peers import fusion_bench_runs
from peers.mergekit_runs import configuration, merge_by_command
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModel

from bmm.checkpoint.tensors import TensorInfo
from bmm.checkpoint.writer import write_weights
from bmm.errors import BMMError
from bmm.prediction import build_model, read_split
from bmm.stages.anchor import write_state
from bmm.stages.request import Work
from bmm.stages.setup import Setup
from bmm.store import Artefact, Draft, Reference

# mergekit 0.1.5 ends in "can only concatenate list (not "tuple") to list" with its own definition of BertModel, and
# takes an encoder that it has no definition of for a causal language model. Where the configuration is of neither it
# merges the tensors by the names that they have.
NO_LANGUAGE_MODEL = {"model_type": "vit", "architectures": ["Encoder"]}
# Rows in one of fusion-bench's batches; its Grams count padding, of which batches of like lengths have little.
BATCH = 32


@dataclass(frozen=True)
class Peer:
    """What another project is asked to do.

    Attributes:
        package: whose code.
        method: its word for the method.
        said: mergekit's `each`, `shared` and `seed`.
    """

    package: Literal["mergekit", "fusion-bench"]
    method: str
    said: Mapping[str, Any]


def merge(peer: Peer, work: Work, setup: Setup, data: Mapping[str, Artefact]) -> tuple[Reference, float]:
    """Return the artefact of the merged encoder under canonical names, and the seconds that the peer's code took.

    Args:
        peer: what is asked for.
        work: the way to the store.
        setup: the merge.
        data: each expert's rows, for methods that read calibration rows.

    Raises:
        BMMError: it fails on these experts.
    """
    reads = peer.package == "fusion-bench"
    splits = {name: read_split(artefact, "calibration") for name, artefact in data.items()} if reads else {}
    inputs = {
        "base": setup.base.digest,
        "experts": {expert.name: expert.model.digest for expert in setup.experts},
        "calibration": {name: split.digest for name, split in splits.items()},
    }
    settings = {**vars(peer), "version": version(peer.package), "batch_size": BATCH if reads else None}

    def make(draft: Draft) -> None:
        with TemporaryDirectory() as folder:
            base, experts = _encoders(setup, Path(folder))
            batches = {name: _batches(setup, name, split.rows) for name, split in splits.items()}
            started = perf_counter()
            said = StringIO()
            try:
                # fusion-bench tells its progress to a terminal that is not its own.
                with redirect_stdout(said), redirect_stderr(said):
                    run = _fusion_bench if reads else _mergekit
                    found = run(peer, base, experts, batches, Path(folder) / "merged")
            except Exception as error:
                raise BMMError(f"{peer.package} failed: {' '.join(str(error).split())[-400:]}") from error
            draft.provenance["seconds"] = perf_counter() - started
            missing = [parameter.name for parameter in setup.layout.shared if parameter.name not in found]
            if missing:
                raise BMMError(f"{peer.package} left out {missing[0]}")
            write_state(draft.path, setup, lambda name: found[name].detach(), dtype="F32")

    reference = work.obtain("peer", inputs, make, settings=settings)
    return reference, float(work.read(reference).provenance["seconds"])


def _encoders(setup: Setup, folder: Path) -> tuple[Path, dict[str, Path]]:
    """Write base and experts, without heads, into folders of their own."""
    config = json.loads((Path(setup.base.path) / "config.json").read_text(encoding="utf-8"))
    with setup.weights() as weights:
        infos = [TensorInfo(p.name, p.shape, p.dtype) for p in setup.layout.shared]

        def write(name: str, get: Any) -> Path:
            place = folder / name
            place.mkdir()
            (place / "config.json").write_text(json.dumps(config), encoding="utf-8")
            write_weights(place, infos, get)
            return place

        base = write("base", weights.base)
        experts = {
            expert.name: write(f"expert-{index}", lambda name, index=index: weights.expert(index, name))
            for index, expert in enumerate(setup.experts)
        }
    return base, experts


def _batches(setup: Setup, name: str, rows: Sequence[Any]) -> list[dict[str, Tensor]]:
    expert = next(expert for expert in setup.experts if expert.name == name)
    with expert.model.open() as checkpoint:
        model = build_model(checkpoint, expert, BATCH, setup.layout)
    return list(model.batches(model.prepare(rows)))


def _mergekit(
    peer: Peer, base: Path, experts: Mapping[str, Path], batches: Mapping[str, Any], output: Path
) -> dict[str, Tensor]:
    for folder in (base, *experts.values()):
        (folder / "config.json").write_text(json.dumps(NO_LANGUAGE_MODEL), encoding="utf-8")
    options = {name: value for name, value in peer.said.items() if name in ("each", "shared")}
    config = configuration(peer.method, base, list(experts.values()), **options)
    merge_by_command(config, output, seed=peer.said.get("seed"))
    found: dict[str, Tensor] = {}
    for path in sorted(output.glob("*.safetensors")):
        with safe_open(path, framework="pt") as handle:
            found |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - no mapping
    return found


def _fusion_bench(
    peer: Peer, base: Path, experts: Mapping[str, Path], batches: Mapping[str, Any], output: Path
) -> dict[str, Tensor]:
    models = {name: AutoModel.from_pretrained(path, local_files_only=True).eval() for name, path in experts.items()}
    if peer.method == "regmean":
        return fusion_bench_runs.regmean(list(models.values()), [batches[name] for name in models])
    start = AutoModel.from_pretrained(base, local_files_only=True).eval()
    return fusion_bench_runs.regmean_plus_plus(start, models, batches, _layers)


def _layers(model: nn.Module) -> nn.ModuleList:
    """Return the stack of layers: the longest list of modules."""
    return max((module for module in model.modules() if isinstance(module, nn.ModuleList)), key=len)
