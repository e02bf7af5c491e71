"""What tests of the tasks share."""

from mlflow_tables import tables  # noqa: F401 - a fixture
