"""Bayesian Model Merging: one model out of several experts fine-tuned from one base.

The library: mathematics, checkpoints, Gram matrices, search, evaluation, reports. It imports neither the
orchestrator (`tasks`, `flows`) nor the tracker. `bmm.merge(bmm.Recipe.from_yaml(path))` runs a whole merge
in this process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bmm.errors import BMMError, UserError

if TYPE_CHECKING:
    from bmm.pipeline import merge
    from bmm.recipe import Recipe

__all__ = ["BMMError", "Recipe", "UserError", "merge"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import the heavy names on first use, so that `import bmm` stays quick."""
    if name == "Recipe":
        from bmm.recipe import Recipe

        return Recipe
    if name == "merge":
        from bmm.pipeline import merge

        return merge
    raise AttributeError(f"module 'bmm' has no attribute '{name}'")
