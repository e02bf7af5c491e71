"""What a person should know of a merge that no table shows, a sentence each. Pure functions of what the stages kept."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

Norms = Mapping[str, Mapping[str, float]]


def zero_task_vectors(norms: Mapping[str, Norms]) -> list[str]:
    """Name the tensors in which experts equal the base; `norms` is expert -> parameter -> `{"norm": …}`."""
    notes = []
    equal: dict[tuple[str, ...], list[str]] = {}
    for expert, entries in norms.items():
        zero = tuple(name for name, entry in entries.items() if entry["norm"] == 0.0)
        if zero and len(zero) == len(entries):
            notes.append(f"The expert {expert} equals the base in every tensor: its task vector is zero.")
        elif zero:
            equal.setdefault(zero, []).append(expert)
    for names, experts in equal.items():
        who = "Every expert" if len(experts) == len(norms) else ", ".join(experts)
        verb = "equal" if len(experts) > 1 and len(experts) < len(norms) else "equals"
        notes.append(f"{who} {verb} the base in {names[0]}{_more(names)}: no task vector there.")
    return notes


def other_bases(trained_on: Mapping[str, str | None], base: str) -> list[str]:
    """Name the adapters that were trained on another base than the recipe's, as far as their names tell.

    Args:
        trained_on: expert -> what its adapter says of its base, a path or a hub id; None for whole models.
        base: the recipe's words for the base.
    """
    wanted = _last(base.partition("@")[0])
    return [
        f"The adapter {expert} says that it was trained on '{other}', and was added to '{base}'."
        for expert, other in trained_on.items()
        if other is not None and _last(other) != wanted
    ]


def _last(source: str) -> str:
    """Return a source's last part: a copy of a model keeps its name more often than its place."""
    return source.rstrip("/").rpartition("/")[2].lower()


def unmeasured(splits: Collection[str]) -> list[str]:
    """Say what cannot be known for want of rows; `splits` are those that were measured on."""
    notes = []
    if "test" not in splits:
        notes.append("The recipe names no test rows, so the merged model was not measured on them.")
    if "validation" not in splits:
        notes.append("The recipe names no validation rows, so no λ and γ were searched.")
    return notes


def singular_grams(coverage: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name the regressed parameters whose Gram matrix does not span its inputs at the chosen `λ`."""
    names = [entry["parameter"] for entry in coverage if entry["lambda"] is not None and entry["condition"] is None]
    if not names:
        return []
    return [
        f"The Gram matrix behind {names[0]}{_more(names)} is singular at the chosen λ: directions that it does "
        "not span keep the anchor."
    ]


def unmatched(names: Sequence[str]) -> list[str]:
    """Name the encoder's parameters that some expert's model lacks, and that are published as the base has them."""
    if not names:
        return []
    return [f"Not every expert's model has {names[0]}{_more(names)}: there the merged model is the base."]


def unused(names: Sequence[str]) -> list[str]:
    """Name the experts' tensors that are left out, since transformers ignores them when it loads the experts."""
    if not names:
        return []
    return [f"Some expert stores {names[0]}{_more(names)}, which its model does not load: left out."]


def starved_experts(coverage: Sequence[Mapping[str, Any]]) -> list[str]:
    """Count the matrices of mixtures of experts that too few calibration tokens reached."""
    starved = {entry["parameter"]: entry["anchored_maps"] for entry in coverage if entry.get("anchored_maps")}
    if not starved:
        return []
    count = sum(len(maps) for maps in starved.values())
    which = f"matrices of experts of a mixture, the first in {next(iter(starved))}"
    return [f"Too few calibration tokens reached {count} {which}: these keep the anchor; give more calibration rows."]


def shards_again(counts: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Say how much of the Gram stage was begun more than once; `counts` is expert -> `computed`, `again`, `found`."""
    again = sum(count["again"] for count in counts.values())
    if not again:
        return []
    computed = sum(count["computed"] for count in counts.values())
    times = "once" if again == 1 else f"{again} times"
    return [
        f"Of the {computed} shards of Gram matrices that were computed, one had to be begun again {times}, after a "
        "worker was lost or a file was damaged."
    ]


def _more(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
