"""The figures of a search: its progress, what mattered, and which tasks were traded for the mean."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import quantiles
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bmm.report import findings, notation, search_findings
from bmm.report.drawing import (
    COLOURS,
    GRID,
    INK,
    MUTED,
    ORIGIN_COLOURS,
    ORIGIN_MARKERS,
    OTHER_COLOUR,
    OTHER_MARKER,
    WIDTH,
    canvas,
    shorten,
)
from bmm.report.findings import Document

_MOST_BARS = 12
_NORMAL = 1.96
ORIGIN_NAMES = {
    "anchor": "◆ anchor",
    "global": "■ one λ for all",
    "sobol": "● Sobol",
    "bayesian": "▲ Bayesian",
    "random": "● random",
    "cma-es": "▼ CMA-ES",
}


def search_progress(document: Document) -> Figure | None:
    """Draw the objective of each trial by origin, the best so far with its 95 % interval, and the anchor's level.

    A trial that was stopped is hollow, at what it was heading for.
    """
    trials = findings.finished_trials(document)
    if not trials:
        return None
    figure, axes = canvas(3.4)
    axes.spines["left"].set_visible(True)
    scale = search_findings.objective_scale(document)
    indices = [trial["index"] for trial in trials]
    values = [scale * trial["objective"] for trial in trials]
    floor = _floor(values, scale)
    right = max(indices) + 0.8
    best, errors = _best_so_far(trials, scale)
    steps = [*indices, right]
    axes.step(steps, [*best, best[-1]], where="post", color=INK, linewidth=1.2, zorder=2)
    if any(errors):
        low, high = ([b + sign * e for b, e in zip(best, errors, strict=True)] for sign in (-_NORMAL, _NORMAL))
        axes.fill_between(
            steps, [*low, low[-1]], [*high, high[-1]], step="post", color=INK, alpha=0.08, linewidth=0, zorder=1
        )
    hollow = {trial["index"] for trial in trials if trial.get("state") == "stopped"}
    origins = list(dict.fromkeys(str(trial.get("origin", "unknown")) for trial in trials))
    for origin in origins:
        colour = ORIGIN_COLOURS.get(origin, OTHER_COLOUR)
        marker = ORIGIN_MARKERS.get(origin, OTHER_MARKER)
        of_origin = [(i, v) for i, v, t in zip(indices, values, trials, strict=True) if t.get("origin") == origin]
        inside = [(i, v) for i, v in of_origin if v >= floor and i not in hollow]
        axes.plot(*_columns(inside), marker, color=colour, markersize=6, markeredgecolor="white", zorder=3)
        open_ones = [(i, v) for i, v in of_origin if v >= floor and i in hollow]
        axes.plot(*_columns(open_ones), marker, color=colour, markersize=5, markerfacecolor="white", zorder=3)
        for index, value in of_origin:
            if value < floor:
                axes.annotate(
                    f"{value:.{0 if scale == 100 else 2}f} ↓",
                    (index, floor),
                    ha="center",
                    va="bottom",
                    size=7,
                    color=colour,
                    zorder=3,
                )
    top = max(values)
    span = max(top - floor, 0.005 * scale)
    axes.set_ylim(floor - 0.06 * span, top + 0.10 * span)
    axes.set_xlim(min(indices) - 0.8, right)
    _label_levels(axes, document, best[-1], right)
    _label_origins(axes, trials, origins)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(axis="y", color=GRID, linewidth=0.7)
    axes.set_xlabel("trial")
    axes.set_ylabel(search_findings.objective_axis(document))
    return figure


def _label_levels(axes: Axes, document: Document, best: float, right: float) -> None:
    """Name the best value and the anchor's level at the right edge, moved apart where they are near."""
    low, high = axes.get_ylim()
    levels = {"best": best}
    anchor = next((t for t in findings.finished_trials(document) if t.get("origin") == "anchor"), None)
    if anchor is not None:
        levels["anchor"] = search_findings.objective_scale(document) * anchor["objective"]
        colour = ORIGIN_COLOURS["anchor"]
        axes.axhline(levels["anchor"], color=colour, linewidth=1.1, linestyle=(0, (4, 3)), zorder=1)
    least = 0.075 * (high - low)
    shown = dict(levels)
    if "anchor" in shown and shown["best"] - shown["anchor"] < least:
        shown["anchor"] = shown["best"] - least
    digits = 1 if search_findings.objective_scale(document) == 100 else 3
    for name, level in levels.items():
        colour = INK if name == "best" else ORIGIN_COLOURS["anchor"]
        axes.annotate(
            f"{name} {notation.decimals(level, digits)}",
            (right, shown[name]),
            (4, 0),
            textcoords="offset points",
            va="center",
            color=colour,
        )


def _label_origins(axes: Axes, trials: list[Mapping[str, Any]], origins: list[str]) -> None:
    """Name each origin above its first trial, in its colour, in as many rows as keep the names apart."""
    low, high = axes.get_xlim()
    character = 0.095 * (high - low) / (WIDTH - 1.6)
    row_ends: list[float] = []
    for origin in origins:
        first = next(t["index"] for t in trials if str(t.get("origin", "unknown")) == origin)
        start = first - 0.3
        text = ORIGIN_NAMES.get(origin, shorten(origin, 20))
        start = max(low, min(start, high - character * len(text)))
        row = next((r for r, end in enumerate(row_ends) if end < start), len(row_ends))
        row_ends[row:] = [start + character * (len(text) + 1), *row_ends[row + 1 :]]
        colour = ORIGIN_COLOURS.get(origin, OTHER_COLOUR)
        axes.annotate(
            text,
            (start, 1.0),
            (0, 4 + 12 * row),
            xycoords=axes.get_xaxis_transform(),
            textcoords="offset points",
            color=colour,
            weight="bold",
            size=8.5,
            parse_math=False,
        )


def _best_so_far(trials: list[Mapping[str, Any]], scale: float) -> tuple[list[float], list[float]]:
    """Return the best value up to each trial and its standard error; of stopped trials none is the best."""
    best, errors = [], []
    value, error = scale * trials[0]["objective"], 0.0
    for trial in trials:
        if trial.get("state") != "stopped" and (scale * trial["objective"] >= value):
            value, error = scale * trial["objective"], scale * math.sqrt(trial.get("variance") or 0.0)
        best.append(value)
        errors.append(error)
    return best, errors


def _floor(values: list[float], scale: float) -> float:
    """Return where the axis may end below, so that one hopeless trial does not flatten all the others."""
    if len(values) < 4:
        return min(values)
    lower = quantiles(values, n=4)[0]
    return max(min(values), lower - 3 * max(max(values) - lower, 0.005 * scale))


def _columns(pairs: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def importance_bars(document: Document) -> Figure | None:
    """Draw how much of the search's ups and downs each hyperparameter accounts for, the most important on top."""
    found = ((document.get("search") or {}).get("importance") or [])[:_MOST_BARS]
    if not found:
        return None
    figure, axes = canvas(0.27 * len(found) + 0.6)
    for index, entry in enumerate(found):
        axes.barh(index, 100 * entry["share"], height=0.6, color=COLOURS["merged"])
        axes.text(100 * entry["share"] + 1, index, f"{100 * entry['share']:.0f}", va="center", color=MUTED, size=8.5)
    axes.set_yticks(range(len(found)), [shorten(entry["name"], 44) for entry in found])
    for label in axes.get_yticklabels():
        label.set_parse_math(False)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.set_xlim(0, 108)
    axes.grid(axis="x", color=GRID, linewidth=0.7)
    axes.set_xlabel("share of the objective's variation over the searched ranges, %")
    return figure


def trade_offs(document: Document) -> Figure | None:
    """Draw each trial's worst task against its mean, the front that no other trial beats, and the one chosen."""
    trials = search_findings.comparable_trials(document)
    pairs = {
        trial["index"]: pair
        for trial in trials
        if (pair := search_findings.mean_and_worst(document, trial)) is not None
    }
    if not pairs:
        return None
    figure, axes = canvas(3.4)
    axes.spines["left"].set_visible(True)
    for trial in trials:
        if trial["index"] in pairs:
            mean, worst = pairs[trial["index"]]
            origin = str(trial.get("origin", "unknown"))
            axes.plot(
                100 * mean,
                100 * worst,
                ORIGIN_MARKERS.get(origin, OTHER_MARKER),
                color=ORIGIN_COLOURS.get(origin, OTHER_COLOUR),
                markersize=6,
                markeredgecolor="white",
                zorder=3,
            )
    front = sorted(pairs[index] for index in search_findings.front(pairs))
    axes.plot(*_columns([(100 * x, 100 * y) for x, y in front]), "-", color=INK, linewidth=1, zorder=2)
    best = findings.best_of_search(document)
    if best is not None and best["index"] in pairs:
        mean, worst = pairs[best["index"]]
        axes.plot(100 * mean, 100 * worst, "o", markersize=13, markerfacecolor="none", color=INK, zorder=4)
        axes.annotate("chosen", (100 * mean, 100 * worst), (-9, -14), textcoords="offset points", ha="right")
    axes.margins(0.08)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_xlabel("mean over tasks, share of the experts' score, %")
    axes.set_ylabel("worst task,\nshare of its expert's score, %")
    return figure
