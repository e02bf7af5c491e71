"""What the answers of a merged model mean, task by task: where it is the same, two models can be compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bmm.digest import digest_json


def tasks_of(document: Mapping[str, Any]) -> dict[str, str]:
    """Return by task its kind and a digest of its classes. `document` is the model's merge.json."""
    return {expert["name"]: f"{expert['task']}:{digest_json(expert['labels'])[:16]}" for expert in document["experts"]}
