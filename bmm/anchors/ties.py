"""TIES: trim, elect sign, merge, on every floating-point tensor (Yadav et al., arXiv 2306.01708).

1. Trim: of each task vector keep the `density` share of largest magnitude, of the whole model (`scope:
   global`, as published) or of each tensor. Entries that tie with the smallest kept one are kept too; zeros
   never are. Of `n` entries the nearest number to `density · n` is kept; mergekit (per tensor) keeps
   `⌊density · n⌋`, fusion-bench (global) one more than that.
2. Elect: each entry's sign is the sign of the sum of the trimmed task vectors.
3. Merge: the mean (or sum) over the experts that kept the entry with that sign, times `scale`. Where the
   trimmed task vectors cancel exactly, no sign wins and the base's entry stays.

The global threshold is exact and needs the memory of one tensor: non-negative float32 numbers sort like
their bit patterns, so one pass counts the upper 16 bits and a second the lower 16 bits within the bin that
holds the threshold.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bmm.anchors.interface import Weights
from bmm.anchors.pieces import pieces
from bmm.anchors.settings import TIESSettings
from bmm.anchors.task_vectors import ScaledAnchor, TaskVectorAnchor, TaskVectors, number
from bmm.errors import BMMError
from bmm.progress import progress

_UPPER_BINS = 1 << 15
_LOWER_BINS = 1 << 16


class TIES(TaskVectorAnchor):
    """Trims, elects signs and merges; the global scope needs `prepare` first."""

    def __init__(self, settings: TIESSettings) -> None:
        self.settings = settings
        self._thresholds: tuple[float, ...] | None = None

    def prepare(self, weights: Weights) -> None:
        """Find every expert's magnitude threshold over all tensors (global scope only): two passes."""
        if self.settings.scope == "global":
            self._thresholds = global_thresholds(weights, self.settings.density)

    def piecewise(self, name: str, weights: Weights) -> ScaledAnchor | None:
        """Return this method with the thresholds that it has, or that are this tensor's."""
        if self.settings.scope == "global":
            return self
        found = TIES(self.settings)
        found._thresholds = piecewise_thresholds(name, weights, self.settings.density)
        return found

    def combine(self, vectors: TaskVectors) -> Tensor | None:
        """Return the merged task vector."""
        # One running sum and count a sign: which sign wins is known only after the last expert.
        up, down = torch.zeros_like(vectors.base), torch.zeros_like(vectors.base)
        ups, downs = (torch.zeros(vectors.base.shape, dtype=torch.int16) for _ in range(2))
        changed = False
        for index in range(vectors.count):
            vector = vectors.at(index)
            changed = changed or bool(vector.any())
            vector = torch.where(_magnitude(vector) >= self._threshold(index, vector), vector, 0.0)
            up += vector.clamp(min=0)
            down += vector.clamp(max=0)
            ups += vector > 0
            downs += vector < 0
        if not changed:
            return None
        if self.settings.combine == "mean":
            merged_up, merged_down = up / ups.clamp(min=1), down / downs.clamp(min=1)
        else:
            merged_up, merged_down = up, down
        elected = up + down
        return torch.where(elected > 0, merged_up, torch.where(elected < 0, merged_down, 0.0))

    @property
    def scale(self) -> float:
        """What the merged task vector is multiplied by: by default 1 for the mean and 0.3 for the sum."""
        if self.settings.scale is not None:
            return number(self.settings.scale)
        return 1.0 if self.settings.combine == "mean" else 0.3

    def _threshold(self, index: int, vector: Tensor) -> float:
        if self._thresholds is not None:
            return self._thresholds[index]
        if self.settings.scope == "global":
            raise BMMError("TIES with the global scope was asked to merge before prepare")
        return tensor_threshold(vector, self.settings.density)


def tensor_threshold(vector: Tensor, density: float) -> float:
    """Return the smallest magnitude (float32) among the `density` share of one task vector's largest."""
    return _smallest_kept(_magnitude(vector), density)


def _smallest_kept(magnitude: Tensor, density: float) -> float:
    """Return the smallest of the magnitudes that are kept; they are put into another order."""
    values = magnitude.contiguous().view(-1).numpy()
    if values.size == 0:
        return 0.0
    smaller = values.size - _kept(values.size, density)
    # numpy selects with the processor's vector instructions, several times faster than torch's `kthvalue`.
    values.partition(smaller)
    return float(values[smaller])


def piecewise_thresholds(name: str, weights: Weights, density: float) -> tuple[float, ...]:
    """Return every expert's `tensor_threshold` of one tensor, in the memory of one expert's magnitudes, float32."""
    magnitude = torch.empty(weights.base(name).numel())
    found = []
    cut = pieces(name, weights)
    for index in range(weights.count):
        for piece in cut:
            vector = TaskVectors(name, piece).at(index)
            magnitude[piece.start : piece.start + vector.numel()] = _magnitude(vector)
        found.append(_smallest_kept(magnitude, density))
    return tuple(found)


def global_thresholds(weights: Weights, density: float) -> tuple[float, ...]:
    """Return for each expert the smallest magnitude (float32) among the `density` share of all its entries.

    Reads every tensor twice and holds one at a time, plus 98,304 counters an expert.

    Raises:
        CheckpointError: a tensor holds NaN or infinities, or has another shape than the base's.
    """
    names = [name for name in weights.names() if weights.base(name).is_floating_point()]
    uppers = torch.zeros(weights.count, _UPPER_BINS, dtype=torch.int64)
    lowers = torch.zeros(weights.count, _LOWER_BINS, dtype=torch.int64)
    with progress("Finding the TIES thresholds", 2 * len(names)) as bar:
        for name in names:
            vectors = TaskVectors(name, weights)
            for index in range(weights.count):
                upper, _ = _bits(vectors.at(index))
                uppers[index] += torch.bincount(upper, minlength=_UPPER_BINS)
            bar.advance()
        size = int(uppers[:1].sum())
        if size == 0:
            return (0.0,) * weights.count
        found = [_bin_of(counts, _kept(size, density)) for counts in uppers]
        for name in names:
            vectors = TaskVectors(name, weights)
            for index, (upper_bin, _) in enumerate(found):
                upper, lower = _bits(vectors.at(index))
                lowers[index] += torch.bincount(lower[upper == upper_bin], minlength=_LOWER_BINS)
            bar.advance()
    thresholds = []
    for counts, (upper_bin, remaining) in zip(lowers, found, strict=True):
        lower_bin, _ = _bin_of(counts, remaining)
        pattern = torch.tensor((upper_bin << 16) | lower_bin, dtype=torch.int32)
        thresholds.append(float(pattern.view(torch.float32)))
    return tuple(thresholds)


def _kept(size: int, density: float) -> int:
    return max(1, round(density * size))


def _magnitude(vector: Tensor) -> Tensor:
    return vector.abs().to(torch.float32)


def _bits(vector: Tensor) -> tuple[Tensor, Tensor]:
    """Return the upper and lower 16 bits of every magnitude, flat."""
    bits = _magnitude(vector).flatten().view(torch.int32)
    return bits >> 16, bits & 0xFFFF


def _bin_of(counts: Tensor, rank: int) -> tuple[int, int]:
    """Return the bin of the `rank`-th largest value (from 1), and its rank among that bin's values."""
    from_top = counts.flip(0).cumsum(0)
    position = int(torch.searchsorted(from_top, rank))
    above = int(from_top[position - 1]) if position > 0 else 0
    return counts.numel() - 1 - position, rank - above
