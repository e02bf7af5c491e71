"""What the commands of the Makefile set for all that they run."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_what_is_compiled_is_kept_wherever_the_machine_would_not() -> None:
    """Without it, each process of the tests compiled torch and all that it imports anew: ten seconds of a core."""
    words = ["make", "--silent", "--eval", 'shown: ; @echo "<$$PYTHONDONTWRITEBYTECODE>"', "shown"]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "<>"
