"""What an artefact was made from, followed back through the manifests to the beginning.

A manifest names what its artefact was made from in two ways: by the digests of inputs (`made_from`) and by the keys of
what was asked for while it was made (`used`). A run's record (`bmm.runs`) names every stage's record and outputs, so
all that a finished merge needs is reached from there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from bmm.store import Entry

USED = "used"
"""In an artefact's provenance: kinds and keys of the artefacts that were asked for while it was made."""

Name = tuple[str, str]
"""An artefact's kind and key."""


class Origins:
    """What each artefact of a store was made from.

    Args:
        entries: the store's listing.
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._entries: dict[Name, Entry] = {(entry.kind, entry.key): entry for entry in entries}
        self._by_digest: dict[str, list[Name]] = {}
        for name, entry in self._entries.items():
            if isinstance(digest := entry.manifest.get("digest"), str):
                self._by_digest.setdefault(digest, []).append(name)

    def of(self, roots: Iterable[Name]) -> set[Name]:
        """Return artefacts with all that they were made from, as far as that is still there."""
        found: set[Name] = set()
        left = [name for name in roots if name in self._entries]
        while left:
            name = left.pop()
            if name not in found:
                found.add(name)
                left += [one for one in self._parents(self._entries[name]) if one not in found]
        return found

    def of_models(self, digests: Collection[str]) -> set[Name]:
        """Return what the models with these digests were made from, and the records of the merges that made them."""
        models = {name for digest in digests for name in self._by_digest.get(digest, []) if name[0] == "model"}
        runs = [
            name
            for name, entry in self._entries.items()
            if name[0] == "run" and models.intersection(self._parents(entry))
        ]
        return self.of([*models, *runs])

    def _parents(self, entry: Entry) -> Iterator[Name]:
        provenance = entry.manifest.get("provenance")
        for value in (entry.manifest.get("made_from"), provenance.get(USED) if isinstance(provenance, dict) else None):
            yield from self._named(value)

    def _named(self, value: Any) -> Iterator[Name]:
        if isinstance(value, str):
            yield from self._by_digest.get(value, [])
        elif isinstance(value, Mapping):
            name = (str(value.get("kind")), str(value.get("key")))
            if name in self._entries:
                yield name
            for part in value.values():
                yield from self._named(part)
        elif isinstance(value, list):
            for part in value:
                yield from self._named(part)
