"""From the words of a recipe to a local model folder: a path, a hub id, or a URI of a registered scheme.

Local folders win and cost no import. What the folder holds is not looked at here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bmm.checkpoint.allowed import check_allowed
from bmm.checkpoint.hub import fetch_from_hub
from bmm.errors import CheckpointError
from bmm.hub import hub_id

_SCHEME = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):")


@dataclass(frozen=True, slots=True)
class Resolved:
    """A model folder on this machine, the words that led to it, and its version if it has one."""

    path: Path
    source: str
    revision: str | None


SchemeResolver = Callable[[str], Resolved]


def _from_bucket(source: str) -> Resolved:
    from bmm.checkpoint.bucket import fetch_source

    path, revision = fetch_source(source)
    return Resolved(path, source, revision)


_schemes: dict[str, SchemeResolver] = {"s3": _from_bucket}


def register_scheme(scheme: str, resolver: SchemeResolver) -> None:
    """Let `resolver` fetch every source that begins with `scheme:`; it gets the whole source."""
    _schemes[scheme.lower()] = resolver


def scheme_of(source: str) -> str | None:
    """Return the scheme that a source begins with ("models"), or None."""
    match = _SCHEME.match(source)
    return None if match is None else match["scheme"].lower()


def resolve(source: str, folder: Path, where: str) -> Resolved:
    """Find the model folder that `source` names, fetching it where it lives elsewhere.

    Args:
        source: a folder, `org/name[@revision]` on the hub, or a URI of a registered scheme.
        folder: what relative paths are relative to (the recipe's folder).
        where: the recipe's key, for messages.

    Raises:
        CheckpointError: nothing is found under that name.
        ModelAwayError: nobody answers who would know.
        UserError: the folder lies outside of `BMM_ALLOWED_FOLDERS`.
    """
    try:
        local = (folder / Path(source).expanduser()).resolve()
        exists, is_folder = local.exists(), local.is_dir()
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{where}: '{source}' is not a usable path: {error}") from None
    scheme, hub = scheme_of(source), hub_id(source)
    if exists or not (scheme or hub):
        check_allowed(local, where)
    if is_folder:
        return Resolved(local, source, None)
    if exists:
        raise CheckpointError(f"{where}: {local} is a file; name the model folder that holds it")
    if scheme:
        return _from_scheme(scheme, source, where)
    if hub:
        snapshot = fetch_from_hub(hub, local, where)
        check_allowed(snapshot, where)
        return Resolved(snapshot, source, snapshot.name)
    raise CheckpointError(
        f"{where}: there is no folder {local}; correct the path, or name a hub model as org/name[@revision]"
    )


def _from_scheme(scheme: str, source: str, where: str) -> Resolved:
    if scheme not in _schemes:
        known = ", ".join(f"{name}:" for name in sorted(_schemes)) or "none"
        raise CheckpointError(
            f"{where}: '{source}' begins with the unknown scheme '{scheme}:' (known here: {known}); "
            "name a folder or a hub model as org/name[@revision]"
        )
    return _schemes[scheme](source)
