"""Which local folders may be read and written, where an operator has set a limit. Nothing else.

`BMM_ALLOWED_FOLDERS` holds folders separated by `os.pathsep`; unset or empty means no limit. The limit holds
for every model folder, its files behind symbolic links, downloads (list the hub's cache folder too) and
outputs.
"""

from __future__ import annotations

import os
from pathlib import Path

from bmm.errors import UserError

VARIABLE = "BMM_ALLOWED_FOLDERS"


def check_allowed(path: Path, what: str) -> None:
    """Refuse a path that lies, once symbolic links are followed, outside of the allowed folders.

    Args:
        path: a file or folder, which need not exist.
        what: what the path is for, at the head of the sentence ("the output folder").

    Raises:
        UserError: the path lies outside; the sentence names it.
    """
    setting = os.environ.get(VARIABLE, "")
    if not setting:
        return
    try:
        resolved = path.expanduser().resolve()
        folders = [Path(entry).expanduser().resolve() for entry in setting.split(os.pathsep) if entry]
    except (OSError, RuntimeError) as error:
        raise UserError(f"{what}: {path} cannot be followed to where it leads: {error}") from None
    if not any(resolved.is_relative_to(folder) for folder in folders):
        raise UserError(
            f"{what}: {path} lies outside of the allowed folders; "
            f"move it into one of them or add its folder to {VARIABLE}"
        )
