"""The import of torch and transformers, without Python's search for garbage meanwhile.

Nothing that three thousand modules make is garbage, and the search looks at all of it again and again: a seventh of the
time that the import takes, and as much once more while a merge runs. Here it is passed over for good, which also leaves
the memory shared that processes forked from this one have (see Python's documentation of `gc.freeze`).
"""

from __future__ import annotations

import gc
import sys


def import_torch_and_transformers() -> None:
    """Import both for good; without effect once torch is there.

    Raises:
        ImportError: as the import itself.
    """
    if "torch" in sys.modules or not gc.isenabled():
        return
    gc.disable()
    try:
        import torch  # noqa: F401
        import transformers.modeling_utils  # noqa: F401
    finally:
        gc.freeze()
        gc.enable()
