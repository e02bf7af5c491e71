"""What the `bmm store` commands do: each returns plain JSON values, and raises `BMMError` when it cannot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bmm.errors import UserError
from flows.commands import opened_store

if TYPE_CHECKING:
    from bmm.retention import Retention


def store_list(store: str | None) -> dict[str, Any]:
    """List the artefacts."""
    opened = opened_store(store)
    entries = [
        {"kind": entry.kind, "key": entry.key, "bytes": entry.bytes, "made": entry.made, "used": entry.used}
        for entry in opened.entries()
    ]
    return {"store": opened.location, "artefacts": entries, "bytes": sum(entry["bytes"] for entry in entries)}


def store_verify(store: str | None, *, mend: bool) -> dict[str, Any]:
    """Read every artefact, name the damaged ones and remove them, so that their stages run again."""
    from bmm.stages.makers import maker_of

    opened = opened_store(store)
    checked = len(opened.entries())
    damaged = [
        {
            "kind": entry.kind,
            "key": entry.key,
            "path": str(entry.path),
            "reason": reason,
            "made_by": maker_of(entry.kind),
            "removed": mend and opened.discard(entry.kind, entry.key),
        }
        for entry, reason in opened.verify()
    ]
    return {"store": opened.location, "checked": checked, "damaged": damaged}


def store_prune(
    store: str | None,
    older_than_days: float | None,
    keep_runs: int | None = None,
    max_bytes: str | None = None,
    *,
    dry_run: bool,
    copies: bool,
    registry: bool = True,
) -> dict[str, Any]:
    """Remove what a policy does not keep, and what killed runs left; or this machine's copies of it alone."""
    from tasks.clearing import clear, clear_copies

    if older_than_days is None and keep_runs is None and max_bytes is None:
        older_than_days = 30.0
    opened = opened_store(store)
    if copies:
        if older_than_days is None:
            raise UserError("copies go by age alone; give --older-than, or leave --keep-runs and --max-bytes out")
        return clear_copies(opened, older_than_days, dry_run=dry_run)
    retention = _retention(older_than_days, keep_runs, max_bytes)
    return clear(opened, retention, dry_run=dry_run, registry=registry)


def _retention(older_than_days: float | None, keep_runs: int | None, max_bytes: str | None) -> Retention:
    from pydantic import ValidationError

    from bmm.retention import Retention

    try:
        return Retention(older_than_days=older_than_days, keep_runs=keep_runs, max_bytes=max_bytes)
    except ValidationError:
        raise UserError(f"--max-bytes is a size such as 200GiB or 1.5TB, not '{max_bytes}'; correct it") from None
