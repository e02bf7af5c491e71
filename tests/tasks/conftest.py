"""What tests of the tasks share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from mlflow_tables import copied_tables


@pytest.fixture(scope="session", autouse=True)
def _tables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with copied_tables(tmp_path_factory.mktemp("mlflow-tables")):
        yield
