"""Gram shards of drawn numbers, whole in a store, for tests of what becomes of them: no model is run."""

from __future__ import annotations

import torch
from safetensors.torch import save_file

from bmm.grams.shards import SHARD, ShardRequest, shards_of
from bmm.grams.sums import SUM
from bmm.modules.linear import LinearMap
from bmm.store import Draft, Reference, Store

SIZES = {"a.dense": 3, "b.dense": 5}
LISTED = SHARD, SUM


def requests(store: Store, count: int, salt: int = 0) -> list[ShardRequest]:
    """Return so many shards of an expert, whose rows the store has."""
    data, _ = store.obtain("expert", "0" * 64, lambda draft: draft.write_json("expert.json", {}))
    maps = [LinearMap(name, size, size, name, "other", None, f"{name}.w", None) for name, size in SIZES.items()]
    whole = ShardRequest(
        expert_digest=f"expert-{salt}",
        split_digest="rows",
        start=0,
        stop=count,
        reading={"kind": "text-classification"},
        batch_size=1,
        maps=tuple(map_.to_json() for map_ in maps),
        store=store.location,
        expert_path="nowhere",
        data=data.to_json(),
    )
    return shards_of(whole, count, 1)


def numbers(place: int) -> dict[str, torch.Tensor]:
    """Return a shard's sums, so unlike each other that the order in which they are added shows."""
    random = torch.Generator().manual_seed(place)
    return {
        name: torch.randn(size, size, generator=random, dtype=torch.float64) * 10.0 ** (place % 9)
        for name, size in SIZES.items()
    }


def put(store: Store, request: ShardRequest) -> Reference:
    """Put a shard into the store."""

    def make(draft: Draft) -> None:
        save_file(numbers(request.start), draft.path / "sums-00000.safetensors")
        draft.write_json("rows.json", dict.fromkeys(SIZES, request.start + 1))
        draft.lasting = False

    return store.obtain(SHARD, request.key(), make)[0]


def in_order(count: int) -> dict[str, torch.Tensor]:
    """Return the plain sum over the first shards."""
    total = numbers(0)
    for place in range(1, count):
        for name, part in numbers(place).items():
            total[name] = total[name] + part
    return total


def listed(store: Store) -> tuple[int, int]:
    """Return how many shards and how many sums there are."""
    shards, sums = (len(store.keys(kind)) for kind in LISTED)
    return shards, sums
