"""What a stage is: a request of plain JSON values in, a result of plain JSON values out.

A request says what the stage is made from (`inputs`, digests), how (`settings`), and, outside its key, where things
lie and how to run (`where`). A result holds references to artefacts, never tensors, so that an orchestrator may keep
it, hand it on, or lose it. The stages themselves are `bmm.stages`; their order is `bmm.pipeline`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from bmm.reachable import USED
from bmm.store import Artefact, Draft, Reference, Store, artefact_key

VERSION = 1
# Of stages whose outcome has changed for equal inputs since: which trial is published (search), how rows are
# multiplied (search and grams), what is told of blended ones (grams), how large matrices are decomposed (anchor).
_VERSIONS = {"search": 6, "grams": 3, "anchor": 3}
_OUTPUTS = "outputs.json"
COVERAGE = "coverage"
"""In the provenance of a `model` artefact that was made without regression: how each parameter came about."""


def version_of(stage: str) -> int:
    """Return the version of what a stage makes: another one is made again."""
    return _VERSIONS.get(stage, VERSION)


@dataclass(frozen=True)
class Request:
    """What one stage is asked to do."""

    stage: str
    inputs: Mapping[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)
    where: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Digest of stage, version, inputs and settings: equal keys, equal results."""
        return artefact_key(f"stage-{self.stage}", version_of(self.stage), self.inputs, self.settings)

    def to_json(self) -> dict[str, Any]:
        """Return the request as plain JSON values."""
        return dict(vars(self))

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Request:
        """Read a request back from `to_json`'s values."""
        return cls(**value)


@dataclass(frozen=True)
class Result:
    """What one stage has made: `outputs` are references, alone or in mappings."""

    stage: str
    key: str
    state: Literal["ran", "cached"]
    seconds: float
    outputs: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain JSON values."""
        return dict(vars(self))

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Result:
        """Read a result back from `to_json`'s values."""
        return cls(**value)

    def reference(self, *path: str) -> Reference:
        """Return the reference that stands under `path` in the outputs."""
        value: Any = self.outputs
        for part in path:
            value = value[part]
        return Reference.from_json(value)


class Work:
    """A stage's way to the store; counts what had to be made."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.made = 0
        self._used: dict[tuple[str, str], None] = {}

    def obtain(
        self, kind: str, inputs: Any, make: Callable[[Draft], None], *, settings: Any = None, version: int = VERSION
    ) -> Reference:
        """Return the artefact made from these inputs and settings, made now if it is not there."""
        key = artefact_key(kind, version, inputs, settings)
        describe = {"inputs": inputs, "settings": settings, "version": version}

        def noting(draft: Draft) -> None:
            outer, self._used = self._used, {}
            try:
                make(draft)
                if self._used:
                    draft.provenance[USED] = self.used()
            finally:
                self._used = outer

        reference, cached = self.store.obtain(kind, key, noting, describe=describe)
        self._used[kind, key] = None
        self.made += not cached
        return reference

    def uses(self, kind: str, key: str) -> None:
        """Note an artefact that was used without being obtained here, so that it is kept with what was made of it."""
        self._used[kind, key] = None

    def used(self) -> list[dict[str, str]]:
        """Return kinds and keys of what was obtained so far, while this artefact is made or at all."""
        return [{"kind": kind, "key": key} for kind, key in self._used]

    def read(self, reference: Reference | Mapping[str, str]) -> Artefact:
        """Return a verified artefact, by reference or by a reference's JSON."""
        if not isinstance(reference, Reference):
            reference = Reference.from_json(reference)
        return self.store.read(reference)


Stage = Callable[[Work, Request], dict[str, Any]]


def perform(load_stage: Callable[[], Stage], store: Store, request: Request) -> Result:
    """Run one stage in this process, unless the store has its record and everything that the record refers to.

    Args:
        load_stage: imports the stage's function; called only if there may be something to do.
        store: where artefacts and records are.
        request: what is asked for.
    """
    started = time.perf_counter()
    known = None if store.fresh else recorded(store, request)
    if known is not None:
        return known
    work = Work(store)
    outputs = load_stage()(work, request)
    describe = {"inputs": dict(request.inputs), "settings": dict(request.settings), USED: work.used()}
    store.obtain(
        f"stage-{request.stage}",
        request.key,
        lambda draft: draft.write_json(_OUTPUTS, outputs),
        describe=describe,
        replace=bool(work.made),
    )
    seconds = time.perf_counter() - started
    return Result(request.stage, request.key, "ran" if work.made else "cached", seconds, outputs)


def recorded(store: Store, request: Request) -> Result | None:
    """Return the result of a stage that has run before, if everything that it made is still whole."""
    started = time.perf_counter()
    found = store.find(f"stage-{request.stage}", request.key)
    if found is None:
        return None
    outputs = store.read(found).read_json(_OUTPUTS)
    result = Result(request.stage, request.key, "cached", 0.0, outputs)
    if not verified(store, result):
        return None
    return replace(result, seconds=time.perf_counter() - started)


def verified(store: Store, result: Result) -> bool:
    """Say whether the store holds every artefact that a result refers to."""
    return all(store.holds(ref) for ref in _references(result.outputs))


def _references(value: Any) -> list[Reference]:
    if isinstance(value, Mapping):
        if set(value) == {"kind", "key", "digest"}:
            return [Reference.from_json({name: str(text) for name, text in value.items()})]
        return [ref for part in value.values() for ref in _references(part)]
    return []
