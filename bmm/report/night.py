"""A night in words and one table, as Markdown: for the run's page and for those who are told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Found = Mapping[str, Any]
_COLUMNS = ("task", "rows", "champion", "new", "difference", "interval", "floor", "")
WORDS = ("task", "")
"""Columns of words; those of numbers stand to the right."""


def headline(found: Found) -> str:
    """Return how the night ended, in one line."""
    model = found.get("model") or found.get("recipe")
    match found["outcome"]:
        case "promoted":
            before = f", before it version {found['previous']}" if found.get("previous") else ""
            return f"{model}: version {found['version']} is the new champion{before}"
        case "rejected":
            kept = f"version {found['champion']} stays" if found.get("champion") else "there is none yet"
            return f"{model}: version {found['version']} did not become the champion, {kept}"
        case "unchanged":
            stays = f"; version {found['champion']} stays the champion" if found.get("champion") else ""
            return f"{model}: nothing has changed{stays}"
        case _:
            return f"{model}: the night failed"


def night_markdown(found: Found) -> str:
    """Return what there is to say of a night: headline, reasons, the gate's table, who was left out, where it is."""
    parts = [f"**{headline(found)}**"]
    parts += [f"- {reason}" for reason in found.get("reasons", [])]
    if left_out := found.get("left_out"):
        parts.append("Left out:\n\n" + "\n".join(f"- {name}: {why}" for name, why in left_out.items()))
    if gate := found.get("gate"):
        parts.append(gate_table(gate))
    where = [("champion in", found.get("output")), ("report", found.get("report"))]
    if found["outcome"] != "failed":
        parts += [f"{what}: `{path}`" for what, path in where if path]
    if mlflow := found.get("mlflow"):
        parts.append(f"MLflow: run {mlflow['run_id']} at {mlflow['uri']}")
    return "\n\n".join(parts)


def gate_table(gate: Mapping[str, Any]) -> str:
    """Return the gate's table, scores in per cent."""
    columns, rows = gate_cells(gate)
    lines = [columns, ["---" if column in WORDS else "---:" for column in columns], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def gate_cells(gate: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the gate's columns and the cells of its rows, without columns that say nothing, as of a first champion."""
    rows = [_cells(row) for row in gate["rows"]]
    said = [place for place in range(len(_COLUMNS)) if any(row[place] for row in rows)]
    return [_COLUMNS[place] for place in said], [[row[place] for place in said] for row in rows]


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the cells of one row of the gate's table."""
    interval = "" if row["low"] is None else f"{100 * row['low']:+.1f} to {100 * row['high']:+.1f}"
    return (
        row["task"],
        str(row["rows"]),
        _per_cent(row["champion"]),
        _per_cent(row["new"]),
        "" if row["difference"] is None else f"{100 * row['difference']:+.1f}",
        interval,
        _per_cent(row["floor"]),
        row["note"],
    )


def _per_cent(score: float | None) -> str:
    return "" if score is None else f"{100 * score:.1f}"
