"""Models of the Hugging Face hub, fetched into the hub's own cache and known by their commit.

A branch is looked up every time: what was fetched of it before never passes for what it holds now. A commit that was
fetched is not asked for again. What the names of models look like is `bmm.hub`'s.
"""

from __future__ import annotations

import errno
import re
from pathlib import Path

from bmm.errors import CheckpointError, ModelAwayError
from bmm.hub import HubId

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
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
_REFUSED = (401, 403)


def fetch_from_hub(hub: HubId, local: Path, where: str) -> Path:
    """Fetch a model's files, and return the folder that holds them, which is named after their commit.

    Args:
        hub: the model, at a branch, tag or commit.
        local: the folder that the same words would name, which does not exist.
        where: the recipe's key, for messages.

    Raises:
        CheckpointError: the hub has no such model or revision, or does not give it to everybody.
        ModelAwayError: the hub does not answer, or refuses the login.
    """
    from huggingface_hub import is_offline_mode
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    model, absent = hub.repository, f"{where}: there is no folder {local}, and the hub"
    try:
        return _snapshot(model, hub.revision)
    except GatedRepoError:
        raise CheckpointError(
            f"{absent} gives '{model}' only to those it has let in; log in with `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{absent} has no revision '{hub.revision}' of '{model}'; correct it") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise CheckpointError(f"{absent} has no such model as '{model}'; correct the path or the name") from None
    except Exception as error:
        # The hub's client lets through whatever its HTTP library, its cache and the network raise.
        if isinstance(error, OSError) and error.errno in _DISK:
            raise CheckpointError(
                f"{where}: the hub's model '{model}' cannot be stored in the hub's cache ({error.strerror}); "
                "free some space or set HF_HOME to another folder"
            ) from error
        if isinstance(error, HfHubHTTPError) and error.response.status_code in _REFUSED:
            raise ModelAwayError(
                f"{absent} refuses this login for '{model}' ({error.response.status_code}); renew it with "
                "`hf auth login`, or in HF_TOKEN"
            ) from None
        if is_offline_mode():
            raise ModelAwayError(
                f"{absent} could not be reached for '{model}', as HF_HUB_OFFLINE is set and not all of it was fetched "
                "before; unset that, or correct the path"
            ) from error
        raise ModelAwayError(
            f"{absent} could not be reached for '{model}'; correct the path, try again with a connection, or set "
            "HF_HUB_OFFLINE=1 to take what was fetched last"
        ) from error


def _snapshot(model: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, constants, is_offline_mode, snapshot_download

    def fetched(version: str | None) -> Path:
        return Path(snapshot_download(model, revision=version, allow_patterns=_PATTERNS, ignore_patterns=["*/*"]))

    if is_offline_mode() or (revision is not None and _COMMIT.fullmatch(revision)):
        return fetched(revision)
    # If the hub does not answer, or has the model no more, a download takes what it fetched before without a word.
    commit = HfApi().model_info(model, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT).sha
    found = fetched(revision)
    return found if found.name == commit else fetched(commit)
