"""The kinds of task by name."""

from __future__ import annotations

from bmm.kinds.image_classification import ImageClassificationKind
from bmm.kinds.interface import Kind
from bmm.kinds.text_classification import TextClassificationKind

_KINDS: dict[str, Kind] = {kind.name: kind for kind in (TextClassificationKind(), ImageClassificationKind())}


def kind_of(name: str) -> Kind:
    """Return a kind of task by the recipe's word for it."""
    return _KINDS[name]
