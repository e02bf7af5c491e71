"""A recipe's file as plain values: YAML, read safely, with keys that are given twice refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from bmm.errors import RecipeError

# `<<: *name` takes in another mapping's keys and may stand several times.
_MERGE_TAG = "tag:yaml.org,2002:merge"


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the keys and values of a recipe's file.

    Raises:
        RecipeError: the file is missing, is not YAML, or holds something else than a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"there is no recipe at {path}; `bmm init DIR` writes one") from None
    except IsADirectoryError:
        raise RecipeError(f"{path} is a folder; name the recipe's YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"the recipe {path} cannot be read: {error}") from None
    try:
        value = parse(text)
    except ValueError as error:
        raise RecipeError(f"the recipe {path} is not valid YAML: {error}") from None
    if not isinstance(value, dict):
        raise RecipeError(f"the recipe {path} must be a mapping of keys such as base_model, experts, output")
    return value


def parse(text: str) -> Any:
    """Return the value of a YAML text.

    Raises:
        ValueError: it is not valid; the message has one line.
    """
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # PyYAML lets through what Python says of an impossible date or number.
        raise ValueError(" ".join(str(error).split())) from None


class _UniqueKeyLoader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML as PyYAML reads it safely, but a key given twice is an error instead of a silent last one."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Refuse repeated keys, then build the mapping."""
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == _MERGE_TAG:
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.MarkedYAMLError(problem=f"the key '{key}' is given twice", problem_mark=key_node.start_mark)
            seen.add(key if isinstance(key, str) else id(key_node))
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return mapping
