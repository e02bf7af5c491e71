"""One expert's Gram matrices: cut into shards of rows, computed anywhere, summed in one order.

A shard's result is a pure function of the expert's weights, the rows and the settings, stored under a key made of
exactly these; computing it twice (a worker died, a run was killed) costs time and changes nothing. The sum runs over
the list of shards, each once, in row order, in float64: the same bytes whoever computed what.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from bmm.checkpoint.architecture import encoder_names
from bmm.checkpoint.verified import open_verified
from bmm.digest import canonical_json
from bmm.evaluation.model import TaskModel
from bmm.grams.collect import GramSum, collect
from bmm.kinds.registry import kind_of
from bmm.modules.linear import LinearMap
from bmm.prediction import read_split
from bmm.store import Artefact, Draft, Reference, Store, artefact_key
from bmm.threads import one_thread

SHARD_VERSION = 2
_WHERE = ("store", "expert_path", "expert_base", "data")


@dataclass(frozen=True)
class ShardRequest:
    """Everything that a worker needs for one shard; plain JSON values, so that it travels anywhere.

    The first block decides the result and makes the key, the second says where things lie. `maps` are one map of each
    input group, as JSON values.
    """

    expert_digest: str
    split_digest: str
    start: int
    stop: int
    reading: Mapping[str, Any]
    batch_size: int
    maps: tuple[Mapping[str, Any], ...]

    store: str
    expert_path: str
    data: Mapping[str, str]
    expert_base: str | None = None

    def key(self) -> str:
        """Return the key of the shard's artefact."""
        values = {name: value for name, value in vars(self).items() if name not in _WHERE}
        return artefact_key("gram-shard", SHARD_VERSION, values, {})


def shards_of(request: ShardRequest, rows: int, shard_rows: int) -> list[ShardRequest]:
    """Cut `rows` rows into shards of `shard_rows`; the cut never depends on the number of workers."""
    return [
        ShardRequest(**{**vars(request), "start": start, "stop": min(start + shard_rows, rows)})
        for start in range(0, rows, shard_rows)
    ]


def compute_shard(values: dict[str, Any]) -> dict[str, Any]:
    """Compute one shard, if the store does not have it, and return the reference to it. Runs in a worker."""
    request = ShardRequest(**{**values, "maps": tuple(values["maps"])})
    store = Store(Path(request.store))

    def make(draft: Draft) -> None:
        split = read_split(store.read(Reference.from_json(request.data)), "calibration")
        model = _loaded(
            request.expert_path,
            request.expert_base,
            request.expert_digest,
            canonical_json(request.reading),
            request.batch_size,
        )
        prepared = model.prepare(split.rows[request.start : request.stop])
        sums = collect(model.encoder, model.batches(prepared), [LinearMap.from_json(value) for value in request.maps])
        tensors = {name: part.total for name, part in sums.items()}
        save_file(tensors, draft.path / "sums.safetensors")
        # Not as the tensors' metadata: safetensors writes several entries in a random order.
        draft.write_json("rows.json", {name: part.rows for name, part in sums.items()})

    # Workers are what runs in parallel, and the bytes must not depend on how many threads a machine has.
    with one_thread():
        reference, _ = store.obtain("gram-shard", request.key(), make)
    return reference.to_json()


@lru_cache(maxsize=1)
def _loaded(path: str, base: str | None, digest: str, reading: str, batch_size: int) -> TaskModel:
    """Return the expert ready to run; the last one stays loaded, since shards of one expert come together."""
    with open_verified(Path(path), digest, Path(base) if base else None) as checkpoint:
        said = json.loads(reading)
        kind = kind_of(said["kind"])
        model = kind.build(checkpoint.config, checkpoint.tokenizer_folder, said, batch_size, Path(path).name)
        names = encoder_names(checkpoint, kind.architecture.prefix(checkpoint.config))
        state = {name: checkpoint.tensor(names[name]) for name in model.encoder_names() if name in names}
        model.load_encoder(state)
        return model


def reduce(shards: Sequence[Artefact], groups: Sequence[str]) -> dict[str, GramSum]:
    """Add up the shards in the order given, one input group at a time, in float64."""
    sums: dict[str, GramSum] = {}
    for shard in shards:
        rows = shard.read_json("rows.json")
        with safe_open(shard.file("sums.safetensors"), framework="pt") as handle:
            for name in groups:
                part = GramSum(handle.get_tensor(name), rows[name])
                if name in sums:
                    sums[name].add(part)
                else:
                    sums[name] = part
    return sums
