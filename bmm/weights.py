"""The weights of base and experts under their canonical names, one tensor at a time.

Sits between checkpoints (stored names, stored dtypes) and the methods (canonical names, float32). Nothing is kept
in memory here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from bmm.checkpoint.layout import Layout, SharedParameter
from bmm.checkpoint.reader import Checkpoint
from bmm.errors import CheckpointError
from bmm.modules.linear import LinearMap


class ExpertWeights:
    """Base and experts, side by side; experts are counted in the order of `experts`.

    Args:
        base: the base checkpoint.
        experts: the experts by name, in the recipe's order.
        layout: which stored tensor is which shared parameter.
        maps: the linear maps that methods of merging have a rule for.
    """

    def __init__(
        self, base: Checkpoint, experts: Mapping[str, Checkpoint], layout: Layout, maps: Sequence[LinearMap]
    ) -> None:
        self._base = base
        self._experts = dict(experts)
        self._order = tuple(experts)
        self._shared = {parameter.name: parameter for parameter in layout.shared}
        self._heads = layout.heads
        self._extra = layout.extra
        self._maps: dict[str, list[LinearMap]] = {}
        for map_ in maps:
            self._maps.setdefault(map_.weight, []).append(map_)

    @property
    def count(self) -> int:
        """Number of experts."""
        return len(self._order)

    def names(self) -> tuple[str, ...]:
        """Return the canonical names of the shared parameters."""
        return tuple(self._shared)

    def parameter(self, name: str) -> SharedParameter:
        """Return what the layout says of a parameter."""
        return self._shared[name]

    def maps(self, name: str) -> Sequence[LinearMap]:
        """Return the linear maps whose matrices a parameter holds."""
        return self._maps.get(name, ())

    def base(self, name: str) -> torch.Tensor:
        """Return the base's tensor in its stored dtype."""
        return self._base.tensor(self._shared[name].base_key)

    def expert(self, index: int, name: str) -> torch.Tensor:
        """Return one expert's tensor in its stored dtype and the base's shape.

        Rows of tokens that the base lacks are left out; rows that the expert lacks are the base's own, so that its task
        vector is zero there.
        """
        expert = self._order[index]
        parameter = self._shared[name]
        tensor = self._experts[expert].tensor(parameter.expert_keys[expert])
        rows = parameter.shape[:1]
        if parameter.shared_rows is None or tensor.shape[:1] == rows:
            return tensor
        if tensor.shape[0] > rows[0]:
            return tensor[: rows[0]]
        rest = self.base(name)[tensor.shape[0] :]
        wide = torch.promote_types(tensor.dtype, rest.dtype)
        return torch.cat([tensor.to(wide), rest.to(wide)])

    def check_finite(self, index: int, name: str) -> None:
        """Refuse a tensor of an expert with NaN or infinite entries.

        Raises:
            CheckpointError: naming the expert's folder and the tensor.
        """
        expert = self._order[index]
        require_finite(self.expert(index, name), self._experts[expert], self._shared[name].expert_keys[expert])

    def check_base_finite(self, name: str) -> None:
        """Refuse a tensor of the base with NaN or infinite entries, as `check_finite` does."""
        require_finite(self.base(name), self._base, self._shared[name].base_key)

    def check_head_finite(self, index: int) -> None:
        """Refuse an expert whose head has NaN or infinite entries, as `check_finite` does."""
        expert = self._order[index]
        own = [stored for stored, _, _ in self._extra.get(expert, {}).values()]
        for stored in dict.fromkeys([*self._heads[expert].values(), *own]):
            require_finite(self._experts[expert].tensor(stored), self._experts[expert], stored)


def require_finite(tensor: torch.Tensor, checkpoint: Checkpoint, stored_name: str) -> None:
    """Refuse a tensor with NaN or infinite entries.

    Raises:
        CheckpointError: naming the checkpoint's folder, the tensor and how many entries are bad.
    """
    if not tensor.is_floating_point():
        return
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise CheckpointError(
            f"{checkpoint.path}: the tensor {stored_name} has {bad} NaN or infinite entries; "
            "train or export this model again"
        )
