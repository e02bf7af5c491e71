"""The report as one HTML page: self-contained, no script, nothing fetched, every text escaped.

This module prepares what page.html.j2 lays out; the words come from findings.py and takeaways.py, the
drawings from figures.py. It writes no file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from bmm.report import findings, notation, search_findings
from bmm.report.figures import TITLES, figures
from bmm.report.findings import Document
from bmm.report.takeaways import takeaways

WORST_CONDITIONED = 8
SOURCE_KEYS = ("name", "source", "digest", "revision", "task", "labels", "license")
COVERAGE_KEYS = ("parameter", "shape", "treatment", "module", "lambda", "gamma", "condition")
TRIAL_KEYS = ("index", "origin", "state", "objective", "settings")


@cache
def environment(*, autoescape: bool) -> Environment:
    """Return the template environment of this package, with the number formats as filters.

    It is kept, with the templates that it has compiled.
    """
    made = Environment(
        loader=PackageLoader("bmm.report", ""),
        autoescape=autoescape,  # noqa: S701 - off for Markdown alone, whose cells `card.cell` escapes
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters.update(
        number=notation.number,
        percent=notation.percent,
        points=notation.points,
        decimals=notation.decimals,
        interval=notation.interval_text,
        lambda_text=notation.lambda_text,
        further=search_findings.further_text,
        general=lambda value: "–" if value is None else f"{value:.3g}",
        seconds=duration,
        grouped=lambda value: "–" if value is None else f"{value:,}",
    )
    return made


def report_page(document: Document) -> str:
    """Return the report of one merge as HTML text; the same document gives the same text."""
    drawn = figures(document)
    said = takeaways(document)
    search = document.get("search") or {}
    view = {
        "opening": findings.opening(document),
        "method": findings.method(document),
        "fits_heads": findings.fits_heads(document),
        "unmeasured": findings.unmeasured(document),
        "warnings": findings.warnings(document),
        "confidence": findings.confidence(document),
        "splits": {split: task_rows(document, split) for split in ("test", "validation")},
        "shares": {role: findings.share(document, role) for role in ("base", "anchor", "merged")},
        "anchor": notation.method_label(document.get("anchor", {}).get("method", "anchor")),
        "methods": findings.methods(document),
        # The drawings are our own output, made without markup from names; everything else is escaped.
        "figures": {
            name: {"svg": Markup(text), "title": TITLES[name], "takeaway": said.get(name, "")}  # noqa: S704
            for name, text in drawn.items()
        },
        "treatments": findings.treatments(document),
        "coverage": [known(entry, COVERAGE_KEYS) for entry in document.get("coverage") or []],
        "worst": _worst_conditioned(document),
        "trials": [known(trial, TRIAL_KEYS) for trial in search.get("trials") or []],
        "best": known(search.get("best") or {}, ("index", "settings")),
        "data": {task: splits for task, splits in (document.get("data") or {}).items() if splits},
        "further": any(map(search_findings.further_text, ((search.get("best") or {}).get("settings") or {}).values())),
        "steered_by": search.get("split") or "validation",
        "objective_scale": search_findings.objective_scale(document),
        "searched": findings.strength_rule(document) == "search",
        "stages": {
            name: known(stage, ("state", "seconds", "key")) for name, stage in (document.get("stages") or {}).items()
        },
        "base": known(document.get("base") or {}, SOURCE_KEYS),
        "experts": [known(expert, SOURCE_KEYS) for expert in document.get("experts") or []],
        "environment": [(key, flat(value)) for key, value in (document.get("environment") or {}).items()],
        "memory": memory(document.get("peak_rss_bytes")),
        "recipe": recipe_yaml(document),
        "recipe_digest": document.get("recipe_digest"),
    }
    return environment(autoescape=True).get_template("page.html.j2").render(view)


def known(entry: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """Return a copy of `entry` in which those of `keys` that it lacks are None, as the templates expect."""
    return {**dict.fromkeys(keys), **entry}


def recipe_yaml(document: Document) -> str:
    """Return the recipe of the document as YAML text, keys in their own order."""
    text: str = yaml.safe_dump(_plain(document.get("recipe") or {}), sort_keys=False, allow_unicode=True, width=100)
    return text


def duration(seconds: float | None) -> str:
    """Return seconds as a person would say them: "0.4 s", "38 s", "4 min 10 s", "2 h 5 min"."""
    if seconds is None:
        return "–"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def memory(size: int | None) -> str:
    """Return a number of bytes in binary units, "1.8 GiB"; a dash for None."""
    if size is None:
        return "–"
    value = float(size)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def flat(value: Any) -> str:
    """Return a JSON value on one line: text as it is, mappings as "key value" pairs, the rest as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {flat(inner)}" for key, inner in value.items())
    return json.dumps(value, ensure_ascii=False)


def task_rows(document: Document, split: str) -> list[dict[str, Any]]:
    """Return the rows of the per-task table; the last is the mean over the tasks."""
    rows = [_task_row(name, entry) for name, entry in findings.tasks(document, split).items()]
    mean = findings.mean(document, split)
    if rows and mean:
        # The mean's own intervals are of shares, not of scores.
        rows.append({**_task_row("mean over the tasks", {**mean, "intervals": {}}), "mean": True})
    return rows


def _task_row(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    merged, expert = entry.get("merged"), entry.get("expert")
    return {
        "name": name,
        "mean": False,
        "metric": entry.get("metric"),
        "rows": entry.get("rows"),
        "values": {role: entry.get(role) for role in ("base", "expert", "anchor", "merged")},
        "intervals": {role: findings.interval_of(entry, role) for role in ("base", "expert", "anchor", "merged")},
        "difference": None if merged is None or expert is None else merged - expert,
    }


def _worst_conditioned(document: Document) -> list[dict[str, Any]]:
    """Return the regressed matrices with the largest condition numbers, worst first."""
    rows = [known(entry, COVERAGE_KEYS) for entry in document.get("coverage") or []]
    rows = [entry for entry in rows if entry["condition"] is not None]
    return sorted(rows, key=lambda entry: -entry["condition"])[:WORST_CONDITIONED]


def _plain(value: Any) -> Any:
    """Return JSON values as the plain types that YAML's safe writer knows."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value
