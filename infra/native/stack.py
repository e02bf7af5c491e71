"""The services of `infra/compose.yaml` on this machine, without containers, all of them on loopback.

    python infra/native/stack.py FOLDER [--free-ports] [--experts DIR] [--only SERVICE …]

starts PostgreSQL, an S3-speaking server, Prefect, MLflow, Dask and a Prefect worker with the compose file's commands,
variables and health checks, says where they are, and ends them with Ctrl-C. `FOLDER/environment.sh` then has the
variables of whoever uses them: `. FOLDER/environment.sh; bmm merge …`. The S3-speaking server is moto's, which keeps
everything in memory: buckets are empty after a restart.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from compose import ROOT, Compose, Service
from postgres import Postgres, find_programs

_POLL_SECONDS = 1.0
_END_SECONDS = 20.0


class Stack:
    """The services' processes.

    Args:
        folder: for secrets, volumes and logs; kept, so that databases are there again next time.
        free_ports: take ports that are free now instead of those of the compose file.
        variables: what the compose file may be told beside the secrets, `BMM_EXPERTS` for example.
    """

    def __init__(self, folder: Path, *, free_ports: bool = False, **variables: str) -> None:
        self.folder = folder.resolve()
        for place in ("home", "logs", "volumes/prefect", "volumes/worker"):
            (self.folder / place).mkdir(parents=True, exist_ok=True)
        secrets = self.folder / "secrets"
        subprocess.run([sys.executable, str(ROOT / "infra" / "services" / "make_secrets.py"), str(secrets)], check=True)
        lines = (secrets / "environment").read_text(encoding="utf-8").splitlines()
        known = dict(line.split("=", 1) for line in lines)
        self.compose = Compose({**known, "BMM_SECRETS": str(secrets), **variables}, self.folder, free_ports=free_ports)
        self._running: dict[str, list[subprocess.Popen[bytes]]] = {}
        self._started: dict[tuple[str, int], Service] = {}

    def up(self, only: Sequence[str] = (), replicas: int | None = None) -> None:
        """Start services, all or some with what they need, and wait until each is well.

        Args:
            only: their names.
            replicas: how many of each that the compose file has several of; as the file says if None.
        """
        wanted = self._with_needs(only or self.compose.names())
        for name in (name for name in self.compose.names() if name in wanted):
            for needed, how in self.compose.service(name).needs.items():
                if how == "service_healthy":
                    self.wait(needed)
            count = self.compose.replicas(name)
            self.start(name, count if replicas is None else min(count, replicas))
        for name in self._running:
            self.wait(name)

    def start(self, name: str, replicas: int = 1) -> None:
        """Start a service's processes; one that only has something to do is waited for."""
        for replica in range(replicas):
            service = self._started[name, replica] = self.compose.service(name, replica)
            log = self._log_path(name, replica)
            if name == "postgres":
                self._start_postgres(service, log)
                continue
            process = _popen(service.command, self._environment(service), log)
            if service.healthcheck:
                self._running.setdefault(name, []).append(process)
            elif (code := process.wait()) != 0:
                raise SystemExit(f"{name} has failed with {code}:\n{self.log(name)}")

    def wait(self, name: str) -> None:
        """Wait until every process of a service is well by the compose file's health check.

        Raises:
            SystemExit: one has ended, or is not well in time.
        """
        for replica, process in enumerate(self._running[name]):
            service = self._started[name, replica]
            end = time.monotonic() + service.patience_seconds
            while self._check(service) != 0:
                if process.poll() is not None or time.monotonic() > end:
                    raise SystemExit(f"{name} is not well:\n{self.log(name, replica)}")
                time.sleep(_POLL_SECONDS)

    def well(self, name: str) -> bool:
        """Say whether a service's first process is well now."""
        return name in self._running and self._check(self._started[name, 0]) == 0

    def pids(self) -> dict[str, list[int]]:
        """Return the process ids of what runs, by service."""
        return {name: [process.pid for process in processes] for name, processes in self._running.items()}

    def end(self, name: str, how: signal.Signals | None = None) -> None:
        """End a service's processes, and what they have started."""
        processes = self._running.pop(name, [])
        # PostgreSQL waits for its clients after a SIGTERM.
        sent = how or (signal.SIGINT if name == "postgres" else signal.SIGTERM)
        for process in processes:
            _signal(process, sent)
        for process in processes:
            try:
                process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                _signal(process, signal.SIGKILL)
                process.wait()
            # Whatever it has left of its group.
            _signal(process, signal.SIGKILL)

    def down(self) -> None:
        """End everything, what came last first."""
        for name in reversed(list(self._running)):
            self.end(name)

    def environment(self, name: str = "worker") -> dict[str, str]:
        """Return the whole environment of a service's processes; the worker's is that of whoever merges."""
        return self._environment(self.compose.service(name))

    def log(self, name: str, replica: int = 0) -> str:
        """Return the end of what a service's process has said."""
        path = self._log_path(name, replica)
        return path.read_text(encoding="utf-8", errors="replace")[-4000:] if path.exists() else ""

    def write_environment(self) -> Path:
        """Write the variables of whoever uses the services as a file for a shell; it holds secrets."""
        path = self.folder / "environment.sh"
        said = self.compose.service("worker").environment
        # Where whoever runs a merge by hand keeps copies is its own affair.
        kept = {key: value for key, value in said.items() if not key.startswith(("PREFECT_HOME", "XDG_", "HF_"))}
        text = "".join(f"export {key}={shlex.quote(value)}\n" for key, value in kept.items())
        with open(path, "w", encoding="utf-8", opener=lambda one, flags: os.open(one, flags, 0o600)) as file:
            file.write(text)
        return path

    def _with_needs(self, names: Sequence[str]) -> set[str]:
        found: set[str] = set()
        left = list(names)
        while left:
            name = left.pop()
            if name not in found:
                found.add(name)
                left += self.compose.service(name).needs
        return found

    def _start_postgres(self, service: Service, log: Path) -> None:
        cluster = Postgres(self.folder / "volumes" / "postgres", service)
        new = cluster.new
        self._running["postgres"] = [_popen(cluster.command(), self._environment(service), log)]
        if new:
            self.wait("postgres")
            cluster.make_databases()

    def _environment(self, service: Service) -> dict[str, str]:
        inherited = {key: os.environ[key] for key in ("LANG", "LC_ALL", "PYTHONPATH", "TMPDIR") if key in os.environ}
        path = os.pathsep.join([str(Path(sys.executable).parent), str(find_programs()), os.environ.get("PATH", "")])
        return {**inherited, "PATH": path, "HOME": str(self.folder / "home"), **service.environment}

    def _check(self, service: Service) -> int:
        done = subprocess.run(
            service.healthcheck, env=self._environment(service), cwd=ROOT, capture_output=True, check=False
        )
        return done.returncode

    def _log_path(self, name: str, replica: int) -> Path:
        return self.folder / "logs" / f"{name}{f'-{replica}' if replica else ''}.log"


@contextmanager
def running(folder: Path, *, free_ports: bool = True, **variables: str) -> Iterator[Stack]:
    """Run all services for the block."""
    stack = Stack(folder, free_ports=free_ports, **variables)
    try:
        stack.up()
        yield stack
    finally:
        stack.down()


def _popen(command: Sequence[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as said:
        return subprocess.Popen(
            command,
            env=environment,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )


def _signal(process: subprocess.Popen[bytes], sent: signal.Signals) -> None:
    try:
        os.killpg(process.pid, sent)
    except ProcessLookupError:
        return


def main() -> None:
    """Run the services until somebody ends this program."""
    parser = argparse.ArgumentParser(description="Run the services of infra/compose.yaml without containers.")
    parser.add_argument("folder", type=Path, help="for secrets, databases and logs")
    parser.add_argument("--free-ports", action="store_true", help="take free ports instead of the compose file's")
    parser.add_argument("--experts", type=Path, default=Path.cwd(), help="the folder that workers see as /experts")
    parser.add_argument("--only", nargs="*", default=(), metavar="SERVICE", help="these services and what they need")
    said = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    stack = Stack(said.folder, free_ports=said.free_ports, BMM_EXPERTS=str(said.experts.resolve()))
    try:
        stack.up(said.only)
        print(f"all is well; in another shell: . {stack.write_environment()}")
        for name in ("prefect:4200", "mlflow:5000", "tls://dask-scheduler:8786"):
            print(f"  {name} is {stack.compose.address(name)}")
        print("Ctrl-C ends it", flush=True)
        signal.pause()
    except KeyboardInterrupt:
        pass
    finally:
        stack.down()


if __name__ == "__main__":
    main()
