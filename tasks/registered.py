"""What the MLflow registry knows of a model that is merged every night: its versions, and moves of its champion.

Plain values, and the tags that they are kept in. Asking the registry and moving its aliases is `tasks.champions`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DIGEST, TASKS, REPLACED, PROMOTED_NIGHT = "bmm.model_digest", "bmm.tasks", "bmm.replaced", "bmm.promoted_night"
"""Tags of a version: the digest of its model, its tasks as JSON, the version it replaced, the night it was promoted."""


@dataclass(frozen=True)
class Version:
    """One version of the model: its number, the digest of its files, and its tasks (`bmm.nightly.tasks`)."""

    number: str
    digest: str
    source: str
    run_id: str
    tasks: Mapping[str, str]
    tags: Mapping[str, str]

    @property
    def replaced(self) -> str | None:
        """The number of the version that this one replaced as the champion."""
        return self.tags.get(REPLACED) or None

    @property
    def night(self) -> str:
        """Which night promoted it, by its signature; empty if none did."""
        return self.tags.get(PROMOTED_NIGHT, "")

    @property
    def rolled_back(self) -> str:
        """Who has rolled it back, and why; empty if nobody has since it was last promoted."""
        who = self.tags.get("bmm.rolled_back_by", "")
        return f"{who}: {self.tags.get('bmm.rolled_back_why', '')}" if who else ""

    @property
    def reason(self) -> str:
        """Why it did not become the champion."""
        return self.tags.get("bmm.reason", "")

    def to_json(self) -> dict[str, Any]:
        """Return what people are told of it, as plain JSON values."""
        return {"version": self.number, "digest": self.digest, "run_id": self.run_id, "tasks": sorted(self.tasks)}


@dataclass(frozen=True)
class Move:
    """A move of the champion that was begun: from which version to which, and what `previous` will be."""

    to: str
    origin: str | None
    previous: str | None
    back: bool
    who: str
    why: str
    at: float
    night: str = ""

    def text(self) -> str:
        """Return the move as one line of JSON."""
        return json.dumps({**vars(self), "who": self.who[:200], "why": self.why[:2000]}, ensure_ascii=False)


@dataclass(frozen=True)
class Standing:
    """Where the aliases point, what the last night was about, and a move that was begun and not ended."""

    champion: Version | None
    previous: Version | None
    challenger: Version | None
    night: str | None
    move: Move | None
