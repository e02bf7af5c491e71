"""MLflow's tracking server and registry with a login, on PostgreSQL and an object store; all from the environment.

MLflow reads its administrator and the database of its users from a file; secrets belong in the environment, so the
file is written here, into a folder that only this user may read, and goes when the machine's temporary files go.
"""

from __future__ import annotations

import configparser
import os
import sys
import tempfile
from pathlib import Path


def main() -> None:
    """Write the login's configuration and become the server; further arguments are the server's."""
    settings = configparser.ConfigParser(interpolation=None)
    settings["mlflow"] = {
        "default_permission": os.environ.get("MLFLOW_DEFAULT_PERMISSION", "EDIT"),
        "database_uri": os.environ["MLFLOW_AUTH_DATABASE_URI"],
        "admin_username": os.environ["MLFLOW_TRACKING_USERNAME"],
        "admin_password": os.environ["MLFLOW_TRACKING_PASSWORD"],
        "authorization_function": "mlflow.server.auth:authenticate_request_basic_auth",
    }
    path = Path(tempfile.mkdtemp(prefix="mlflow-")) / "login.ini"
    with open(path, "w", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        settings.write(file)
    os.environ["MLFLOW_AUTH_CONFIG_PATH"] = str(path)
    # What follows would read them as a client's own login.
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        del os.environ[name]
    command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", *sys.argv[1:]]
    os.execv(sys.executable, command)


if __name__ == "__main__":
    main()
