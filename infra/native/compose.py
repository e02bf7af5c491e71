"""The compose file as a machine without containers reads it: the same commands, variables and health checks.

Names of services become 127.0.0.1, ports become those that are free here, mounts become folders. Nothing else is
changed, so what runs here has run with the file's own words.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "infra" / "compose.yaml"
_VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?:(?P<how>:-|:\?)(?P<rest>[^}]*))?\}")


@dataclass(frozen=True)
class Service:
    """One process of one service, as it is started here."""

    name: str
    command: list[str]
    environment: dict[str, str]
    healthcheck: list[str]
    patience_seconds: float
    needs: dict[str, str]
    """Services that come first, each with what is waited for: `service_healthy` and the like."""


class Compose:
    """The services of a compose file, in terms of this machine.

    Args:
        variables: the secrets' file, and whatever else the file asks for.
        folder: where volumes lie.
        free_ports: take ports that are free now instead of those that the file names.
        file: the compose file.
    """

    def __init__(
        self, variables: Mapping[str, str], folder: Path, *, free_ports: bool = False, file: Path = FILE
    ) -> None:
        self._folder = folder
        self._variables = variables
        self._said: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
        self._file = file
        native = self._said["x-native"]
        wanted: Sequence[int] = native["ports"]
        self._ports = dict(zip(wanted, _free(len(wanted)) if free_ports else wanted, strict=True))
        self._replica_ports: list[int] = native["replica_ports"]
        self._stand_ins: dict[str, Any] = native["stand_ins"]
        self._free = free_ports

    def names(self) -> list[str]:
        """Return the services so that each comes after those that it needs."""
        order: list[str] = []

        def visit(name: str) -> None:
            for needed in self._needs(name):
                visit(needed)
            if name not in order:
                order.append(name)

        for name in self._said["services"]:
            visit(name)
        return order

    def replicas(self, name: str) -> int:
        """Return how many of a service there are."""
        return int(self._said["services"][name].get("deploy", {}).get("replicas", 1))

    def service(self, name: str, replica: int = 0) -> Service:
        """Return a service as it is started here."""
        said, stand_in = self._said["services"][name], self._stand_ins.get(name, {})
        ports = self._ports if not replica else {**self._ports, **self._own_ports(replica)}
        check = said.get("healthcheck", {})

        def here(text: str) -> str:
            return self._here(text, said, ports)

        return Service(
            name,
            [here(str(word)) for word in stand_in.get("command", said.get("command", []))],
            {key: here(str(value)) for key, value in said.get("environment", {}).items()},
            [here(word) for word in stand_in.get("healthcheck", check.get("test", [None])[1:])],
            _seconds(check.get("start_period", "60s"))
            + check.get("retries", 0) * _seconds(check.get("interval", "0s")),
            self._needs(name),
        )

    def address(self, text: str) -> str:
        """Return an address of the compose file (`tls://dask-scheduler:8786`) as it is here."""
        return self._here(text, {}, self._ports)

    def path(self, inside: str) -> Path | None:
        """Return what is mounted at a place inside the containers, None for what is not."""
        for service in self._said["services"].values():
            mounts = self._mounts(service)
            for target, place in mounts.items():
                if inside == target or inside.startswith(f"{target}/"):
                    return Path(place + inside.removeprefix(target))
        return None

    def _needs(self, name: str) -> dict[str, str]:
        needs = self._said["services"][name].get("depends_on", {})
        return {needed: how["condition"] for needed, how in needs.items()}

    def _own_ports(self, replica: int) -> dict[int, int]:
        own = _free(len(self._replica_ports)) if self._free else [port + replica for port in self._replica_ports]
        return dict(zip(self._replica_ports, own, strict=True))

    def _here(self, text: str, service: Mapping[str, Any], ports: Mapping[int, int]) -> str:
        text = _VARIABLE.sub(self._value, text)
        names = "|".join(map(re.escape, self._said["services"]))
        numbers = "|".join(map(str, ports))
        # Addresses (name:port, :port), and ports that stand alone; not numbers inside words, such as a secret's.
        text = re.sub(rf"(?<![\w.-])(?:{names}):(?=(?:{numbers})(?!\w))", "127.0.0.1:", text)
        text = re.sub(rf"(?<!\w)(?:{numbers})(?!\w)", lambda found: str(ports[int(found[0])]), text)
        for target, place in sorted(self._mounts(service).items(), key=lambda one: -len(one[0])):
            text = re.sub(rf"(?<![\w/.-]){re.escape(target)}(?![\w.-])", place, text)
        return text.replace("0.0.0.0", "127.0.0.1")  # noqa: S104 - it is what is replaced

    def _value(self, found: re.Match[str]) -> str:
        value = self._variables.get(found["name"], "")
        if not value and found["how"] == ":?":
            raise SystemExit(f"{self._file.name} needs {found['name']}: {found['rest']}")
        return value or (found["rest"] or "" if found["how"] == ":-" else "")

    def _mounts(self, service: Mapping[str, Any]) -> dict[str, str]:
        mounts = {}
        for volume in service.get("volumes", []):
            # The part before the first colon that is not a variable's own.
            source, target, *_ = _VARIABLE.sub(self._value, volume).split(":")
            inside = source.startswith((".", "/"))
            mounts[target] = str(
                (self._file.parent / source).resolve() if inside else self._folder / "volumes" / source
            )
        for secret in service.get("secrets", []):
            source = _VARIABLE.sub(self._value, self._said["secrets"][secret]["file"])
            mounts[f"/run/secrets/{secret}"] = str((self._file.parent / source).resolve())
        return mounts


def _seconds(text: str) -> float:
    units = {"s": 1.0, "m": 60.0}
    return float(text[:-1]) * units[text[-1]]


def _free(count: int) -> list[int]:
    """Return ports of the loopback that nobody listens at."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()
