"""Which stage, or else which command, makes an artefact of a kind: for people who are told that one is gone."""

from __future__ import annotations

_STAGES = {
    "layout": "experts",
    "expert": "experts",
    "task-vectors": "task-vectors",
    "grams": "grams",
    "gram-shard": "grams",
    "gram-sum": "grams",
    "anchor": "anchor",
    "direction": "anchor",
    "fisher": "anchor",
    "walk": "search",
    "walk-group": "search",
    "search": "search",
    "predictions": "evaluate",
    "noise": "eval --samples",
    "evaluation": "evaluate",
    "model": "publish",
    "run": "merge",
    "unsent": "merge",
}


def maker_of(kind: str) -> str:
    """Return what makes an artefact of this kind; a stage's record is made by the stage."""
    return _STAGES.get(kind, kind.removeprefix("stage-"))
