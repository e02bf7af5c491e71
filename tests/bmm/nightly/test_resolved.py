from __future__ import annotations

import subprocess
import sys


def test_importing_what_finds_out_that_nothing_is_new_loads_neither_torch_nor_what_draws() -> None:
    program = "import sys, bmm.nightly.resolved; print(*{'torch', 'transformers', 'matplotlib'} & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert said.stdout.split() == []
