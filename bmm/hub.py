"""What the names of models and data sets on a hub look like. Nothing is asked of any hub here."""

from __future__ import annotations

import re
from dataclasses import dataclass

_WORD = r"[A-Za-z0-9][\w.-]*"
_ID = re.compile(rf"(?P<owner>{_WORD})/(?P<name>{_WORD})(@(?P<revision>[\w./-]+))?", re.ASCII)
# The hub's own rules for the names of repositories.
_LONGEST = 96
_FORBIDDEN = ("--", "..")


@dataclass(frozen=True, slots=True)
class HubId:
    """`owner/name`, or `owner/name@revision`: a branch, a tag, a commit, or `refs/pr/N`."""

    repository: str
    revision: str | None

    @property
    def mistake(self) -> str | None:
        """What the hub would refuse about the name, or None."""
        if len(self.repository) > _LONGEST:
            return f"is longer than the {_LONGEST} characters that a hub id may have"
        odd = next((part for part in _FORBIDDEN if part in self.repository), None)
        if odd is not None:
            return f"has '{odd}' in it, which no hub id may have"
        if self.repository.endswith((".", "-", ".git")):
            return "ends as no hub id may end"
        return None


def hub_id(source: str) -> HubId | None:
    """Return the hub id that a source is, by its form alone, or None if it has another form."""
    match = _ID.fullmatch(source)
    return None if match is None else HubId(f"{match['owner']}/{match['name']}", match["revision"])
