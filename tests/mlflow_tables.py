"""MLflow's tables in a new SQLite file, copied from the first that this process has made instead of made anew.

Making them runs all of MLflow's migrations, which take seconds of a core, and dozens of tests begin with a new store. A
conftest.py whose tests track merges imports `tables`.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=True)
def tables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Have each new file of this process's begin as the first began, for the session."""
    from mlflow.store.db import utils

    made, first = utils._initialize_tables, tmp_path_factory.mktemp("mlflow-tables") / "first.db"

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
