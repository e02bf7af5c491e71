"""Where every tensor of a merge comes from, as `bmm.checkpoint.comparison` finds it.

Plain JSON, so that later stages and reruns need neither transformers nor torch to know which parameters are merged,
which travel with each expert's head and which of the base's are of no use.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bmm.checkpoint.tensors import TensorInfo


@dataclass(frozen=True, slots=True)
class SharedParameter:
    """One parameter (or buffer) that the base and all experts have.

    Attributes:
        name: canonical name.
        shape: the base's shape, and that of all experts but for the rows of other vocabularies.
        dtype: the base's dtype, in safetensors' words.
        base_key: name in the base, for `Checkpoint.tensor`.
        expert_keys: expert -> name in that expert.
        expert_dtypes: expert -> its dtype, which may differ from the base's among floats.
        shared_rows: rows that base and all experts have, where their vocabularies differ; None for the same shape.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    base_key: str
    expert_keys: dict[str, str]
    expert_dtypes: dict[str, str]
    shared_rows: int | None = None

    @property
    def info(self) -> TensorInfo:
        """The parameter as the base stores it, under its canonical name."""
        return TensorInfo(self.name, self.shape, self.dtype)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where every tensor of a merge comes from.

    Attributes:
        prefix: the task models' name for their encoder.
        shared: by canonical name, sorted.
        heads: expert -> {name in the task model's state dict: stored name} of what travels with the head.
        dropped: the base's stored names that no merge uses, sorted (its own head, an unused pooler).
        extra: expert -> {name of the head's parameter: (stored name, first row, rows)}: the rows of an expert's own
            tokens, which travel with its head.
        vocabulary: the base's number of tokens, padding included, where an expert has another; else None.
        tokenizers: experts whose tokenizer has other tokens than the base's.
        tied: groups of names in the task models that stand for one parameter, which is merged under the first.
        copies: the base's stored names that repeat a merged parameter -> that parameter's canonical name.
        unmatched: canonical names of the base's encoder parameters that some expert's model lacks (a pooler), sorted.
        unused: stored names of experts' float tensors that their models do not load and that are left out, sorted.
    """

    prefix: str
    shared: tuple[SharedParameter, ...]
    heads: dict[str, dict[str, str]]
    dropped: tuple[str, ...]
    extra: dict[str, dict[str, tuple[str, int, int]]] = field(default_factory=dict)
    vocabulary: int | None = None
    tokenizers: tuple[str, ...] = ()
    tied: tuple[tuple[str, ...], ...] = ()
    copies: dict[str, str] = field(default_factory=dict)
    unmatched: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    def extra_rows(self, expert: str) -> dict[str, int]:
        """Return by parameter of the head how many rows of its own an expert has."""
        return {name: rows for name, (_, _, rows) in self.extra.get(expert, {}).items()}

    def to_json(self) -> dict[str, Any]:
        """Return the layout as plain JSON values."""
        shared = [
            {
                "name": parameter.name,
                "shape": list(parameter.shape),
                "dtype": parameter.dtype,
                "base_key": parameter.base_key,
                "expert_keys": dict(parameter.expert_keys),
                "expert_dtypes": dict(parameter.expert_dtypes),
                "shared_rows": parameter.shared_rows,
            }
            for parameter in self.shared
        ]
        heads = {expert: dict(keys) for expert, keys in self.heads.items()}
        extra = {expert: {name: list(place) for name, place in rows.items()} for expert, rows in self.extra.items()}
        return {
            "prefix": self.prefix,
            "shared": shared,
            "heads": heads,
            "dropped": list(self.dropped),
            "extra": extra,
            "vocabulary": self.vocabulary,
            "tokenizers": list(self.tokenizers),
            "tied": [list(names) for names in self.tied],
            "copies": dict(self.copies),
            "unmatched": list(self.unmatched),
            # Named only where there are any, so that a layout without them reads as it always did.
            **({"unused": list(self.unused)} if self.unused else {}),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Layout:
        """Build the layout that `to_json` described; one kept by an earlier version knows of one vocabulary only."""
        shared = tuple(SharedParameter(**{**entry, "shape": tuple(entry["shape"])}) for entry in value["shared"])
        heads = {expert: dict(keys) for expert, keys in value["heads"].items()}
        extra = {
            expert: {name: (str(stored), int(first), int(rows)) for name, (stored, first, rows) in places.items()}
            for expert, places in value.get("extra", {}).items()
        }
        tokenizers = tuple(value.get("tokenizers", ()))
        return cls(
            prefix=value["prefix"],
            shared=shared,
            heads=heads,
            dropped=tuple(value["dropped"]),
            extra=extra,
            vocabulary=value.get("vocabulary"),
            tokenizers=tokenizers,
            tied=tuple(tuple(names) for names in value.get("tied", ())),
            copies=dict(value.get("copies", {})),
            unmatched=tuple(value.get("unmatched", ())),
            unused=tuple(value.get("unused", ())),
        )


def dotted(prefix: str) -> str:
    """Return what a prefix puts before a name: nothing where it is empty."""
    return f"{prefix}." if prefix else ""
