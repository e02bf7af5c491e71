"""One expert's Gram matrices, cut into shards of rows, each computed anywhere.

A shard's result is a pure function of the expert's weights, the rows and the settings, stored under a key made of
exactly these; computing it twice (a worker died, a run was killed) costs time and changes nothing. The bytes are the
same whoever computed it, with the whole expert in memory or one layer at a time. Their sum is `bmm.grams.sums`.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from bmm.away import store_at_hand
from bmm.checkpoint.architecture import encoder_names
from bmm.checkpoint.reader import Checkpoint
from bmm.checkpoint.verified import open_verified
from bmm.device import placed, worker_device
from bmm.digest import canonical_json
from bmm.evaluation.model import TaskModel
from bmm.grams.collect import GramSum, collect
from bmm.grams.settings import SAMPLE, sample_in
from bmm.grams.stream import Stream
from bmm.kinds.registry import kind_of
from bmm.memory import MANY, give_back
from bmm.modules.linear import LinearMap
from bmm.modules.tokens import Sample
from bmm.modules.units import units_of
from bmm.prediction import read_split
from bmm.store import Draft, Reference, Store, artefact_key
from bmm.threads import one_thread

SHARD = "gram-shard"
"""The kind of shards."""
SHARD_VERSION = 4
FILE_BYTES = 32 * 2**20
"""About as large is each file of sums."""
_FLOAT64 = 8
_lock = threading.Lock()
_kept: dict[tuple[object, ...], TaskModel] = {}
"""The expert that this process has loaded, one at most. Used under the lock."""
_WHERE = ("store", "expert_path", "expert_base", "data", "streamed")


@dataclass(frozen=True)
class ShardRequest:
    """Everything that a worker needs for one shard; plain JSON values, so that it travels anywhere.

    The first block decides the result and makes the key, the second says where things lie, and whether the expert is
    `streamed`, a layer at a time. `maps` are one map of each input group, as JSON values. At most so many `tokens` of
    each sequence are kept, drawn with `tokens_seed`; None for all.
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
    streamed: bool = False
    tokens: int | None = None
    tokens_seed: int = 0

    def key(self) -> str:
        """Return the key of the shard's artefact."""
        values = {name: value for name, value in vars(self).items() if name not in (*_WHERE, *SAMPLE)}
        return artefact_key(SHARD, SHARD_VERSION, {**values, **sample_in(vars(self))}, {})


def shards_of(request: ShardRequest, rows: int, shard_rows: int) -> list[ShardRequest]:
    """Cut `rows` rows into shards of `shard_rows`; the cut never depends on the number of workers."""
    return [
        ShardRequest(**{**vars(request), "start": start, "stop": min(start + shard_rows, rows)})
        for start in range(0, rows, shard_rows)
    ]


@dataclass(frozen=True)
class ShardAnswer:
    """What a worker says of a shard: where it is, and how often it was begun until it was whole; 0 if it was there."""

    reference: Reference
    attempts: int


def compute_shard(values: dict[str, Any]) -> ShardAnswer:
    """Compute one shard, if the store does not have it. Runs in a worker.

    Raises:
        StoreAwayError: the store does not show the rows; it may come back.
    """
    # A worker that somebody started with several threads has one model, and runs one shard at a time.
    with _lock:
        return _computed(ShardRequest(**{**values, "maps": tuple(values["maps"])}))


def forget() -> None:
    """Let go of the expert that this process has loaded, the rows and the store, unless it is at another run's shard.

    It is not waited for: Dask calls this in the thread that answers its scheduler.
    """
    if _lock.acquire(blocking=False):
        try:
            _kept.clear()
            _rows.cache_clear()
            _store_at.cache_clear()
        finally:
            _lock.release()


def _computed(request: ShardRequest) -> ShardAnswer:
    store = _store_at(request.store)
    data = Reference.from_json(request.data)
    attempts = 0

    def make(draft: Draft) -> None:
        nonlocal attempts
        attempts = _attempts(draft)
        maps = [LinearMap.from_json(value) for value in request.maps]
        counted: dict[str, int] = {}
        waiting: dict[str, Tensor] = {}
        # It is summed soon, and thousands of files would be waited for.
        draft.lasting = False
        files = dict(enumerate(_files(maps)))
        try:
            # Workers are what runs in parallel, and the bytes must not depend on how many threads a machine has.
            with one_thread():
                for sums in _sums(request, maps, _rows(request.store, data)[request.start : request.stop]):
                    waiting |= {name: part.total.cpu() for name, part in sums.items()}
                    counted |= {name: part.rows for name, part in sums.items()}
                    for place in [place for place, names in files.items() if waiting.keys() >= names]:
                        _save(draft, place, files.pop(place), waiting)
                for place, names in files.items():
                    _save(draft, place, names, waiting)
        except (OSError, SafetensorError):
            # Refused by the disk and not killed, so that there is no attempt to be counted, and nothing left behind.
            shutil.rmtree(draft.progress, ignore_errors=True)
            raise
        # Not as the tensors' metadata: safetensors writes several entries in a random order.
        draft.write_json("rows.json", counted)
        shutil.rmtree(draft.progress)

    with store_at_hand(store, data):
        reference, _ = store.obtain(SHARD, request.key(), make)
    return ShardAnswer(reference, attempts)


def _files(maps: Sequence[LinearMap]) -> list[set[str]]:
    """Return the input groups of each file of sums: those of whole units of the network, as many as make one size.

    So sums that come a layer at a time are written before much else of the network is computed.
    """
    files: list[set[str]] = []
    size = 0
    for unit in units_of(maps):
        own = sum(_FLOAT64 * members[0].inputs ** 2 for members in unit.groups.values())
        if not files or size + own > FILE_BYTES:
            files.append(set())
            size = 0
        files[-1] |= set(unit.groups)
        size += own
    return files


def _save(draft: Draft, place: int, names: Collection[str], waiting: dict[str, Tensor]) -> None:
    """Write those of a file's sums that there are, and let go of them."""
    found = {name: waiting.pop(name) for name in sorted(names) if name in waiting}
    if found:
        save_file(found, draft.path / f"sums-{place:05}.safetensors")


def _attempts(draft: Draft) -> int:
    """Count one more attempt at a draft, where those are counted that were killed."""
    # Not its parents, which a store that has just gone away would be made anew by.
    for folder in (draft.progress.parent, draft.progress):
        folder.mkdir(exist_ok=True)
    with (draft.progress / "attempts").open("ab") as marks:
        marks.write(b".")
        return marks.tell()


@lru_cache(maxsize=1)
def _store_at(store: str) -> Store:
    """Return the store; one for all shards of a worker, so that the rows are not checked anew for each."""
    return Store.open(store)


@lru_cache(maxsize=1)
def _rows(store: str, data: Reference) -> Sequence[Any]:
    """Return the calibration rows, of which each shard takes a few."""
    return read_split(_store_at(store).read(data), "calibration").rows


def _sums(request: ShardRequest, maps: Sequence[LinearMap], rows: Sequence[Any]) -> Iterator[dict[str, GramSum]]:
    """Yield the shard's sums: all at once, or a part of the network after the other, whole units at a time."""
    where = (request.expert_path, request.expert_base, request.expert_digest)
    sample = Sample.of(vars(request), request.start)
    if not request.streamed:
        model = _loaded(*where, canonical_json(request.reading), request.batch_size)
        batches = placed(model.batches(model.prepare(rows)), worker_device())
        yield collect(model.encoder, batches, maps, sample)
        return
    with _opened(*where) as checkpoint:
        model, names = _built(checkpoint, request.reading, request.batch_size)

        def give(name: str) -> Tensor:
            return checkpoint.tensor(names[name])

        model.expect_encoder(names, give)
        yield from Stream(model.encoder, names, give, list(model.batches(model.prepare(rows))), maps, sample).sums()


def _opened(path: str, base: str | None, digest: str) -> Checkpoint:
    return open_verified(Path(path), digest, Path(base) if base else None)


def _loaded(path: str, base: str | None, digest: str, reading: str, batch_size: int) -> TaskModel:
    """Return the expert ready to run; the last one stays loaded, since shards of one expert come together."""
    which = (path, base, digest, reading, batch_size)
    if which not in _kept:
        # Before the next one is there: two experts at once would not fit where one does.
        _kept.clear()
        give_back(MANY)
        _kept[which] = _load(*which)
    return _kept[which]


def _load(path: str, base: str | None, digest: str, reading: str, batch_size: int) -> TaskModel:
    with _opened(path, base, digest) as checkpoint:
        model, names = _built(checkpoint, json.loads(reading), batch_size)
        model.load_encoder({name: checkpoint.tensor(stored) for name, stored in names.items()})
        model.module.to(worker_device())
        return model


def _built(checkpoint: Checkpoint, said: Mapping[str, Any], batch_size: int) -> tuple[TaskModel, dict[str, str]]:
    """Return the expert's model without weights, and canonical -> stored name of those that it takes."""
    kind = kind_of(said["kind"])
    model = kind.build(checkpoint.config, checkpoint.tokenizer_folder, said, batch_size, checkpoint.path.name)
    stored = encoder_names(checkpoint, kind.architecture.prefix(checkpoint.config))
    return model, {name: stored[name] for name in model.encoder_names() if name in stored}
