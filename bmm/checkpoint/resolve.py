"""From the words of a recipe to a local model folder: a path, a hub id, or a URI of a registered scheme.

Local folders win and cost no import. What the folder holds is not looked at here.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bmm.checkpoint.allowed import check_allowed
from bmm.errors import CheckpointError, ModelAwayError, UserError
from bmm.hub import hub_id

_SCHEME = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):")
# The model card is text and carries the licence; chat templates belong to the tokenizer. Subfolders hold
# the same model in other formats.
_PATTERNS = [
    "model*.safetensors",
    "adapter_model.safetensors",
    "*.json",
    "*.txt",
    "*.model",
    "chat_template*",
    "README.md",
]
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


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
        return _from_hub(source, hub.repository, hub.revision, local, where)
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


def _from_hub(source: str, model: str, revision: str | None, local: Path, where: str) -> Resolved:
    import huggingface_hub
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    absent = f"{where}: there is no folder {local}, and the hub"
    try:
        snapshot = Path(
            huggingface_hub.snapshot_download(
                model, revision=revision, allow_patterns=_PATTERNS, ignore_patterns=["*/*"]
            )
        )
    except UserError:
        raise
    except GatedRepoError:
        raise CheckpointError(
            f"{absent} gives '{model}' only to those it has let in; log in with `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{absent} has no revision '{revision}' of '{model}'; correct it") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise CheckpointError(f"{absent} has no such model as '{model}'; correct the path or the name") from None
    except Exception as error:
        # The hub's client lets through whatever its HTTP library, its cache and the network raise.
        if isinstance(error, OSError) and error.errno in _DISK:
            raise CheckpointError(
                f"{where}: the hub's model '{model}' cannot be stored in the hub's cache ({error.strerror}); "
                "free some space or set HF_HOME to another folder"
            ) from error
        raise ModelAwayError(
            f"{absent} could not be reached for '{model}'; correct the path, or try again with a connection"
        ) from error
    check_allowed(snapshot, where)
    return Resolved(snapshot, source, snapshot.name)
