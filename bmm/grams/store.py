"""Gram matrices on disk: a Zarr group an expert, written once and never changed.

One float64 array `(in, in)` per input group, holding the *sum* `XᵀX` so that parts still add, with the number of
rows in its attributes. Chunks divide `in` up to 1024, are checksummed (crc32c), and unwritten ones read as NaN, so a
lost chunk cannot pass for zeros; the artefact's manifest counts and digests them as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import zarr
from zarr.codecs import Crc32cCodec

from bmm.errors import ArtefactDamagedError
from bmm.grams.collect import GramSum

STATISTIC = "sum of outer products, padding left out"
"""What the sums of activations are, for people."""
_LARGEST_CHUNK = 1024


class GramReader:
    """Gram sums of one expert, read one at a time.

    Args:
        path: the Zarr group's folder.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._group = zarr.open_group(path, mode="r", zarr_format=3, use_consolidated=False)
        self.provenance: dict[str, Any] = dict(self._group.attrs)

    def names(self) -> list[str]:
        """Return the names of the input groups."""
        return sorted(self._group.array_keys())

    def rows(self, name: str) -> int:
        """Return the number of rows behind one Gram."""
        return int(str(self._group[name].attrs["rows"]))

    def size(self, name: str) -> int:
        """Return the number of inputs, `in`, of one Gram."""
        return int(self._group[name].shape[0])

    def gram(self, name: str) -> torch.Tensor:
        """Return `G = XᵀX / rows`, `(in, in)` float64.

        Raises:
            ArtefactDamagedError: a chunk is missing or damaged.
        """
        part = self.sum(name)
        return part.total / max(part.rows, 1)

    def sum(self, name: str) -> GramSum:
        """Return the sum `XᵀX`, `(in, in)` float64, and its rows.

        Raises:
            ArtefactDamagedError: a chunk is missing or damaged.
        """
        array = self._group[name]
        try:
            total = torch.from_numpy(array[:])
        except ValueError as error:
            raise ArtefactDamagedError(f"the Gram matrix of {name} in {self._path.name} is damaged: {error}") from None
        if bool(torch.isnan(total).any()):
            raise ArtefactDamagedError(f"the Gram matrix of {name} in {self._path.name} has lost a chunk")
        return GramSum(total, self.rows(name))


def write(
    path: Path,
    sums: Iterable[tuple[str, GramSum]],
    provenance: Mapping[str, Any],
    *,
    statistic: str = STATISTIC,
) -> None:
    """Write the sums of one expert as a new Zarr group at `path`, one after the other.

    Args:
        path: where the group goes.
        sums: each input group's name and sum; they may be made as they are asked for.
        provenance: kept in the group's attributes.
        statistic: what the sums are, for people; kept in each array's attributes.
    """
    group = zarr.open_group(path, mode="w", zarr_format=3)
    group.attrs.update(dict(provenance))
    for name, part in sums:
        size = part.total.shape[0]
        array = group.create_array(
            name,
            shape=(size, size),
            chunks=(_chunk(size), _chunk(size)),
            dtype="float64",
            fill_value=float("nan"),
            compressors=[Crc32cCodec()],
            attributes={"rows": part.rows, "statistic": statistic},
        )
        array[:] = part.total.numpy()


def _chunk(size: int) -> int:
    """Return the largest divisor of `size` that is at most 1024 (or `size` cut evenly, if it has no good one)."""
    if size <= _LARGEST_CHUNK:
        return size
    divisors = [step for step in range(1, _LARGEST_CHUNK + 1) if size % step == 0]
    return divisors[-1] if divisors[-1] >= _LARGEST_CHUNK // 4 else _LARGEST_CHUNK
