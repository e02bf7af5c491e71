"""The packages behind a cluster that not everybody has: an optional extra, imported when a recipe asks for it."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from bmm.errors import RecipeError


def required(module: str, package: str, key: str) -> ModuleType:
    """Import a module of the extra `cluster`.

    Args:
        module: its name.
        package: the package that has it.
        key: of the recipe, that asks for it.

    Raises:
        RecipeError: it is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise
        raise RecipeError(
            f"'{key}' needs the package {package}, which is not installed; "
            "add it with pip install 'bayesian-model-merging[cluster]'"
        ) from None
