"""Locks on files: the kernel holds one for as long as its process lives, and drops it however that ends.

`filelock` would make the folder of a lock file that is not there; a store whose disk is away must not be made anew in
its place, so the files are opened here and only locked by it. What is locked, and why, is said where that is done.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import lock_descriptor


@contextmanager
def locked_file(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a file, which is made if it is not there; yields whether it is held.

    Args:
        path: of the file; its folder has to be there.
        wait: until nobody else holds it; without, the block runs all the same.

    Raises:
        OSError: the file cannot be opened, for want of its folder, say.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            held = lock_descriptor(descriptor, blocking=wait)
            # One that was removed while it was waited for guards no name: others lock the file made since.
            if not held or os.fstat(descriptor).st_nlink:
                yield held
                return
        finally:
            # The lock goes with it.
            os.close(descriptor)
