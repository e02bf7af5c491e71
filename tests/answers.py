"""What a `bmm` command said, and which files of an output tell of the run rather than being the model."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

TOLD = ("merge.json", "report.html", "README.md")
"""Files of the output that tell of the run; every other one is the model and must never depend on it."""

_NOTE = re.compile(r".*, \d+\.\d s(, [\d,]+ \w+/s)?(, about \d+ s left)?$")


@dataclass(frozen=True)
class Answer:
    """What a command said."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """The one JSON document on standard output."""
        found: dict[str, Any] = json.loads(self.out)
        return found

    @property
    def complaints(self) -> list[str]:
        """Lines on standard error that are not notes on pieces of work ("reading rows, 2.3 s, 8 rows/s")."""
        return [line for line in self.err.splitlines() if line.strip() and not _NOTE.match(line)]

    def states(self) -> dict[str, str]:
        """Each stage's state, of a merge with `--json` that went well."""
        assert self.code == 0, self.out + self.err
        return {stage: entry["state"] for stage, entry in self.document["stages"].items()}
