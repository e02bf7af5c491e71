"""What goes from a store and what stays: by age, by count, by bytes. Pure: nothing is read or removed here.

Protected artefacts never go, whatever the limits. Of the others goes

* what nobody has used for `older_than_days`;
* what only merges older than the last `keep_runs` were made from;
* what was used longest ago, until all that stays fits into `max_bytes`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from bmm.part import SIZE_PATTERN, Part
from bmm.reachable import Name, Origins
from bmm.runs import KIND as RUN
from bmm.sizes import parse_bytes
from bmm.store import Entry

_DAY = 86400.0

Why = Literal["age", "runs", "bytes"]


class Retention(Part):
    """How much a store may keep; a limit that is None does not count."""

    older_than_days: float | None = Field(default=None, ge=0, description="what nobody has used for so long goes")
    keep_runs: int | None = Field(
        default=None, ge=0, description="what only merges older than the last so many were made from goes"
    )
    max_bytes: str | None = Field(
        default=None,
        pattern=SIZE_PATTERN,
        description="what was used longest ago goes, until the rest takes no more, 200GiB for example",
    )

    @property
    def limit(self) -> int | None:
        """`max_bytes` as a number."""
        return None if self.max_bytes is None else parse_bytes(self.max_bytes)


@dataclass(frozen=True)
class Going:
    """An artefact that goes, and by which limit."""

    entry: Entry
    why: Why


def choose(entries: Sequence[Entry], retention: Retention, protected: Collection[Name], now: float) -> list[Going]:
    """Return what goes, that used longest ago first.

    Args:
        entries: the store's listing.
        retention: the limits.
        protected: what stays in any case.
        now: the time in seconds since 1970.
    """
    going: dict[Name, Going] = {}
    by_age = sorted((entry for entry in entries if _name(entry) not in protected), key=_age)
    if retention.older_than_days is not None:
        before = now - retention.older_than_days * _DAY
        going |= {_name(entry): Going(entry, "age") for entry in by_age if entry.used < before}
    if retention.keep_runs is not None:
        old = _of_old_runs(entries, retention.keep_runs)
        going |= {
            _name(entry): Going(entry, "runs") for entry in by_age if _name(entry) in old and _name(entry) not in going
        }
    if retention.limit is not None:
        left = sum(entry.bytes for entry in entries if _name(entry) not in going)
        for entry in by_age:
            if left <= retention.limit:
                break
            if _name(entry) not in going:
                going[_name(entry)] = Going(entry, "bytes")
                left -= entry.bytes
    return sorted(going.values(), key=lambda one: _age(one.entry))


def _of_old_runs(entries: Sequence[Entry], keep: int) -> set[Name]:
    """Return what merges were made from, without what the last of them were made from."""
    origins = Origins(entries)
    runs = [_name(entry) for entry in sorted(entries, key=_age, reverse=True) if entry.kind == RUN]
    return origins.of(runs[keep:]) - origins.of(runs[:keep])


def _age(entry: Entry) -> tuple[float, Name]:
    """A key that puts what was used longest ago first; ties by name, so that a listing's order decides nothing."""
    return entry.used, _name(entry)


def _name(entry: Entry) -> Name:
    return entry.kind, entry.key
