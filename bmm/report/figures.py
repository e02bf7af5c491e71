"""The figures of a report: task bars and methods, and by name those of the search and of λ by depth and type.

`figures` gives them as SVG text, `pngs` as bytes, `build` as figure objects; each figure exists only when the
document has data for it. Style and encoding are in drawing.py, the search's figures in search_figures.py, the
λ map in heatmap.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache

from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from bmm.report import findings, notation
from bmm.report.drawing import (
    COLOURS,
    GRID,
    INK,
    MUTED,
    canvas,
    png_bytes,
    shorten,
    style,
    svg,
)
from bmm.report.findings import Document
from bmm.report.heatmap import lambda_map
from bmm.report.search_figures import importance_bars, search_progress, trade_offs

TITLES = {
    "tasks": "Test scores by task: base, anchor, merged and expert",
    "methods": "Share of the experts' mean test score, by method",
    "search": "Search progress: objective of each trial",
    "importance": "What mattered in the search",
    "trades": "The mean of the tasks against the worst of them, by trial",
    "lambda": "Prior strength by layer and module type",
}


def build(document: Document) -> dict[str, Figure]:
    """Return every figure that the document has data for, by name, in the order a report shows them."""
    with style():
        drawn = {name: builder(document) for name, builder in _BUILDERS.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def figures(document: Document) -> dict[str, str]:
    """Return every figure as an SVG element; the same document gives the same text."""
    return dict(_svgs(_read(document)))


def pngs(document: Document) -> dict[str, bytes]:
    """Return every figure as PNG bytes; the same document gives the same."""
    return dict(_pngs(_read(document)))


def _read(document: Document) -> str:
    """Return what figures are drawn from, and nothing else, as JSON text."""
    return json.dumps({part: document[part] for part in _PARTS if part in document})


# A page is written, sent to the tracker, and written anew with its address: nothing that is drawn has changed since.
@lru_cache(maxsize=8)
def _svgs(read: str) -> dict[str, str]:
    return {name: svg(name, figure, TITLES[name]) for name, figure in build(json.loads(read)).items()}


@lru_cache(maxsize=8)
def _pngs(read: str) -> dict[str, bytes]:
    return {name: png_bytes(figure) for name, figure in build(json.loads(read)).items()}


def task_bars(document: Document) -> Figure | None:
    """Draw four bars a task on the test split, with whiskers where there are intervals."""
    found = findings.tasks(document)
    if not found:
        return None
    bar = 0.17 if len(found) <= 8 else 0.13
    heading, gap = 0.22, 0.12
    group = heading + len(findings.ROLES) * bar + gap
    figure, axes = canvas(len(found) * group + 0.55)
    size = 8.5 if len(found) <= 8 else 7.0
    for index, (name, entry) in enumerate(found.items()):
        top = index * group
        title = shorten(name, 56)
        name_size = 9 if len(title) <= 40 else 7.5
        title += f"  ({entry['rows']:,} rows)" if entry.get("rows") else ""
        axes.text(0, top + heading / 2, title, va="center", weight="bold", parse_math=False, size=name_size)
        for position, role in enumerate(findings.ROLES):
            value = entry.get(role)
            if value is None:
                continue
            middle = top + heading + (position + 0.5) * bar
            axes.barh(middle, 100 * value, height=0.86 * bar, color=COLOURS[role])
            interval = findings.interval_of(entry, role)
            end = 100 * (value if interval is None else max(value, interval[1]))
            if interval is not None:
                limits = [100 * limit for limit in interval]
                axes.plot(limits, [middle, middle], "-|", color=INK, linewidth=1, markersize=4, path_effects=_HALO)
            axes.text(
                end + 1.2,
                middle,
                f"{notation.number(value)} {role}",
                va="center",
                size=size,
                color=INK if role == "merged" else MUTED,
                weight="bold" if role == "merged" else "normal",
            )
    axes.set_xlim(0, 122)
    axes.set_ylim(len(found) * group, 0)
    axes.set_xticks(range(0, 101, 20))
    axes.set_yticks([])
    axes.grid(axis="x", color=GRID, linewidth=0.7)
    axes.set_xlabel(_metric_label(document))
    return figure


def method_dots(document: Document) -> Figure | None:
    """Draw each method's share of the experts' mean with its interval, best on top, merged highlighted."""
    rows = findings.methods(document)
    if not rows:
        return None
    figure, axes = canvas(0.27 * len(rows) + 0.6)
    for index, row in enumerate(rows):
        highlighted = row.method == "merged"
        colour = COLOURS["merged"] if highlighted else MUTED
        if row.interval is not None:
            axes.plot(
                [100 * limit for limit in row.interval],
                [index, index],
                color=colour,
                linewidth=2.4 if highlighted else 1.4,
                solid_capstyle="butt",
            )
        face = "white" if row.method in ("base", "experts") else colour
        axes.plot(
            100 * row.share,
            index,
            "o",
            markersize=8 if highlighted else 6,
            color=colour,
            markerfacecolor=face,
        )
    ends = [row.share for row in rows] + [limit for row in rows for limit in row.interval or ()]
    low, high = 100 * min(ends), 100 * max(ends)
    span = max(high - low, 1.0)
    axes.set_xlim(low - 0.04 * span, high + 0.04 * span)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    if low <= 100 <= high:
        axes.axvline(100, color=MUTED, linewidth=0.8, linestyle=(0, (3, 3)), zorder=0)
    axes.set_yticks(range(len(rows)), [shorten(row.label, 34) for row in rows])
    values = axes.secondary_yaxis("right")
    shown = [
        f"{notation.number(row.share)}" + (f"  ({notation.interval_text(row.interval)})" if row.interval else "")
        for row in rows
    ]
    values.set_yticks(range(len(rows)), shown)
    values.spines["right"].set_visible(False)
    for axis in (axes.yaxis, values.yaxis):
        axis.set_tick_params(length=0)
        for row, label in zip(rows, axis.get_ticklabels(), strict=True):
            label.set_parse_math(False)
            if row.method == "merged":
                label.set(weight="bold", color=COLOURS["merged"])
    axes.grid(axis="x", color=GRID, linewidth=0.7)
    axes.set_xlabel(f"share of the experts' mean test score, %  ({findings.confidence(document)} intervals)")
    return figure


def _metric_label(document: Document) -> str:
    names = sorted({str(entry.get("metric", "score")) for entry in findings.tasks(document).values()})
    return f"test {' / '.join(names)}, %  ({findings.confidence(document)} intervals)"


_HALO = [withStroke(linewidth=2.6, foreground="white")]  # a dark whisker must show on a dark bar
_PARTS = ("anchor", "coverage", "methods", "metrics", "recipe", "search")
_BUILDERS: dict[str, Callable[[Document], Figure | None]] = {
    "tasks": task_bars,
    "methods": method_dots,
    "search": search_progress,
    "importance": importance_bars,
    "trades": trade_offs,
    "lambda": lambda_map,
}
