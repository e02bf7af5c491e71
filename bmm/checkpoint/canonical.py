"""One name for each tensor of an encoder, whatever a checkpoint stores it under and however many names are tied to it.

Comparing what is stored under such names is `bmm.checkpoint.comparison`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bmm.checkpoint.architecture import Architecture, encoder_names
from bmm.checkpoint.layout import dotted
from bmm.checkpoint.reader import Checkpoint
from bmm.errors import CheckpointError


def canonical_names(
    checkpoint: Checkpoint, prefix: str, tied: Sequence[Sequence[str]]
) -> tuple[dict[str, str], dict[str, str]]:
    """Return canonical name -> stored name of the encoder's tensors, a tied one under its group's first name alone.

    Also returns the stored names that repeat one of them -> its canonical name; any one of a group is enough.

    Args:
        checkpoint: the checkpoint.
        prefix: the task models' name for their encoder.
        tied: groups of names in the task models.

    Raises:
        CheckpointError: the names of one tied parameter hold different values.
    """
    names = encoder_names(checkpoint, prefix)
    heads = {name: name for name in set(checkpoint.names()) - set(names.values())}
    copies: dict[str, str] = {}
    for group in tied:
        inside = [name.removeprefix(dotted(prefix)) for name in group if name.startswith(dotted(prefix))]
        places = [names[name] for name in inside if name in names] + [heads[name] for name in group if name in heads]
        if not inside or not places:
            continue
        for other in places[1:]:
            if not _equal(checkpoint, places[0], other):
                raise CheckpointError(
                    f"{checkpoint.path} has different values under '{places[0]}' and '{other}', which its architecture "
                    "ties to each other; untie no weights when fine-tuning, or save the model again"
                )
            copies[other] = inside[0]
        for name in inside:
            names.pop(name, None)
        names[inside[0]] = places[0]
    return names, copies


def _equal(checkpoint: Checkpoint, one: str, other: str) -> bool:
    import torch

    return torch.equal(checkpoint.tensor(one), checkpoint.tensor(other))


def tied_names(
    base: Checkpoint, experts: Mapping[str, Checkpoint], architectures: Mapping[str, Architecture]
) -> tuple[tuple[str, ...], ...]:
    """Return the groups of names that every expert's model ties as the base does.

    Raises:
        CheckpointError: an expert's model ties what the base keeps apart, or the other way round.
    """
    found: dict[tuple[str, ...], None] = {}
    for expert, checkpoint in experts.items():
        wanted, own = set(architectures[expert].tied(base)), set(architectures[expert].tied(checkpoint))
        for names in sorted(wanted ^ own):
            verbs = ("ties", "keeps apart") if names in own else ("keeps apart", "ties")
            raise CheckpointError(
                f"expert '{expert}' {verbs[0]} '{names[0]}' and '{names[-1]}', which the base {verbs[1]}; fine-tune it "
                "with the base's own tie_word_embeddings"
            )
        found |= dict.fromkeys(sorted(own))
    return tuple(found)
