"""MLflow's tables in a new SQLite file, copied from the first that this process has made instead of made anew.

Making them runs all of MLflow's migrations, which take seconds of a core, and hundreds of tests begin with a new store.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def copied_tables(folder: Path) -> Iterator[None]:
    """Have each new file of this process's begin as the first began, which is kept in a folder, for the block."""
    from mlflow.store.db import utils

    made, first = utils._initialize_tables, folder / "first.db"

    def copied(engine: Any) -> None:
        if engine.dialect.name != "sqlite":
            made(engine)
            return
        if not first.exists():
            made(engine)
            _copy(Path(engine.url.database), first)
        else:
            _copy(first, Path(engine.url.database))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "_initialize_tables", copied)
        yield


def _copy(source: Path, target: Path) -> None:
    """Copy a database by SQLite's own means: either may be open."""
    with closing(sqlite3.connect(source)) as there, closing(sqlite3.connect(target)) as here:
        there.backup(here)
