"""Nothing that a killed command started runs on: a watcher outlives the command and ends what it left.

Prefect's temporary server is a process that its parent stops on the way out, and a parent that is killed (SIGKILL,
out of memory) has no way out. The watcher is a small process that reads from a pipe which only the command holds: the
kernel closes it with the command, however it ends. Children are known by a mark in the environment that they inherit,
so nothing started later can be missed, and nobody else's process is ever touched.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from functools import cache

import psutil

_MARK = "BMM_STARTED_BY"
_GRACE_SECONDS = 2.0
_TERM_SECONDS = 5.0


@cache
def end_orphans() -> subprocess.Popen[bytes]:
    """Start the watcher, once in this process; call it before anything that it should look after."""
    mark = uuid.uuid4().hex
    # A session of its own: Ctrl-C at the terminal is for the command, which then stops its children itself.
    watcher = subprocess.Popen(  # noqa: S603 - this file, by this interpreter
        [sys.executable, "-P", __file__, mark],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.environ[_MARK] = mark
    return watcher


def _started_by(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(_MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def _watch(mark: str) -> None:
    """Wait for the command's end, then end what carries its mark."""
    sys.stdin.buffer.read()
    # After an ordinary end the children are already on their way out.
    time.sleep(_GRACE_SECONDS)
    for end in (psutil.Process.terminate, psutil.Process.kill):
        left = _started_by(mark)
        for process in left:
            try:
                end(process)
            except psutil.Error:
                continue
        psutil.wait_procs(left, timeout=_TERM_SECONDS)


if __name__ == "__main__":
    _watch(sys.argv[1])
