"""Jobs in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.workers import share_out

from bmm.errors import BMMError


def halved(number: int) -> float:
    return number / 2


def who(number: int) -> int:
    return os.getpid()


def die(number: int) -> None:
    os._exit(3)


@pytest.mark.parametrize("processes", [1, 2])
def test_jobs_are_shared_out_and_all_come_back(processes: int) -> None:
    assert sorted(share_out([4, 2, 6], halved, processes)) == [(0, 4, 2.0), (1, 2, 1.0), (2, 6, 3.0)]


def test_a_process_that_dies_is_told() -> None:
    with pytest.raises(BMMError, match=r"the process at work on [24] has ended"):
        list(share_out([4, 2], die, 2))


def test_the_processes_of_a_killed_benchmark_end_with_it(tmp_path: Path) -> None:
    program = """
import os, signal, sys
from pathlib import Path
from benchmarks.test_workers import who
from benchmarks.workers import share_out

if __name__ == "__main__":
    for _, _, process in share_out([0, 1, 2, 3], who, 2):
        print(process, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""
    (tmp_path / "killed.py").write_text(program, encoding="utf-8")
    code = [str(Path(__file__).parents[level]) for level in (1, 2)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(code)}
    # The pipe of its output closes when the last process that holds it has ended.
    done = subprocess.run(
        [sys.executable, tmp_path / "killed.py"],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        check=False,
    )
    assert done.returncode == -9
    assert done.stdout
