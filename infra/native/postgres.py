"""PostgreSQL of this machine, as the image of the compose file would set it up: a new cluster, then the databases.

It refuses to run as root, so root starts it as the user `postgres` (else `nobody`). It listens on loopback alone and
asks everybody for a password (SCRAM).
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from pathlib import Path

from compose import ROOT, Service

DATABASES = ROOT / "infra" / "services" / "databases.sql"


def find_programs() -> Path:
    """Return the folder of PostgreSQL's programs, the newest version's.

    Raises:
        SystemExit: there are none.
    """
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    on_path = shutil.which("initdb")
    if not found and on_path is None:
        raise SystemExit("PostgreSQL is not installed; infra/native/install does that where apt-get is there")
    return found[-1].parent if found else Path(str(on_path)).resolve().parent


class Postgres:
    """A cluster in a folder.

    Args:
        folder: of its files; made anew if it is not there.
        service: what the compose file says of it.
    """

    def __init__(self, folder: Path, service: Service) -> None:
        self._folder = folder
        self._service = service
        self._programs = find_programs()
        self._user = _unprivileged()

    @property
    def new(self) -> bool:
        """Whether the cluster has yet to be made."""
        return not (self._folder / "PG_VERSION").exists()

    def command(self) -> list[str]:
        """Return what starts the server, after making its cluster if need be."""
        if self.new:
            self._make()
        options = {"listen_addresses": "127.0.0.1", "unix_socket_directories": ""}
        words = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        program, *given = self._service.command
        return self._as_user([str(self._programs / program), "-D", str(self._folder), *given, *words])

    def make_databases(self) -> None:
        """Make the servers' roles and databases, as the image does on its first start."""
        port = self._service.command[self._service.command.index("-p") + 1]
        said = self._service.environment
        environment = {**os.environ, **said, "PGPASSWORD": said["POSTGRES_PASSWORD"]}
        words = ["-h", "127.0.0.1", "-p", port, "-U", "postgres", "-v", "ON_ERROR_STOP=1", "--no-psqlrc", "--quiet"]
        subprocess.run([str(self._programs / "psql"), *words, "-f", str(DATABASES)], env=environment, check=True)

    def _make(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        password = self._folder.with_name(f"{self._folder.name}.password")
        said = self._service.environment
        try:
            with open(password, "w", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
                file.write(said["POSTGRES_PASSWORD"])
            if self._user is not None:
                for path in (self._folder, password):
                    os.chown(path, self._user.pw_uid, self._user.pw_gid)
            command = [
                str(self._programs / "initdb"),
                "-D",
                str(self._folder),
                "-U",
                "postgres",
                "--pwfile",
                str(password),
            ]
            command += said["POSTGRES_INITDB_ARGS"].split()
            done = subprocess.run(self._as_user(command), capture_output=True, text=True, cwd="/", check=False)
            if done.returncode:
                shutil.rmtree(self._folder)
                raise SystemExit(f"PostgreSQL's files cannot be made in {self._folder}: {done.stderr.strip()}")
        finally:
            password.unlink(missing_ok=True)

    def _as_user(self, command: list[str]) -> list[str]:
        if self._user is None:
            return command
        return ["setpriv", f"--reuid={self._user.pw_uid}", f"--regid={self._user.pw_gid}", "--clear-groups", *command]


def _unprivileged() -> pwd.struct_passwd | None:
    """Return the user that the server runs as where root starts it, None where it may run as whoever does."""
    if os.getuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise SystemExit("PostgreSQL does not run as root, and there is no user postgres or nobody")
