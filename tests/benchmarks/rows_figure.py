"""The figure of accuracy against calibration rows: one line a method, its band from the worst to the best draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from bmm.report.drawing import GRID, INK, MUTED, canvas, png_bytes, style

COLOURS = {"module-wise": "#e69f00", "hybrid": "#009e73", "propagated": "#0072b2"}
MARKERS = {"module-wise": "s", "hybrid": "D", "propagated": "o"}


def write(path: Path, zoo: str, over_rows: Mapping[str, Any], published: tuple[str, float] | None) -> None:
    """Write the figure as PNG.

    Args:
        path: of the file.
        zoo: its name.
        over_rows: for each method its points, `{"rows", "by_seed"}`, fewest rows first.
        published: the best published method that is no part of the lines, with its share of the experts.
    """
    with style():
        figure = draw(zoo, over_rows, published)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png_bytes(figure))


def draw(zoo: str, over_rows: Mapping[str, Any], published: tuple[str, float] | None) -> Figure:
    """Return the figure; see `write`."""
    figure, axes = canvas(4.2)
    axes.set_xscale("log", base=2)
    ends: list[tuple[float, str, str]] = []
    for method, points in over_rows.items():
        rows = [point["rows"] for point in points]
        means = [100 * sum(point["by_seed"]) / len(point["by_seed"]) for point in points]
        lows = [100 * min(point["by_seed"]) for point in points]
        highs = [100 * max(point["by_seed"]) for point in points]
        colour = COLOURS[method]
        axes.fill_between(rows, lows, highs, color=colour, alpha=0.15, linewidth=0)
        axes.plot(rows, means, color=colour, marker=MARKERS[method], markersize=4.5, linewidth=1.6)
        ends.append((means[-1], method, colour))
    ticks = sorted({point["rows"] for points in over_rows.values() for point in points})
    if published is not None:
        name, share = published
        axes.plot([ticks[0], ticks[-1]], 2 * [100 * share], color=MUTED, linestyle=(0, (4, 3)), linewidth=1.0)
        ends.append((100 * share, name, MUTED))
    for place, (value, name, colour) in zip(_apart([end[0] for end in ends], axes.get_ylim()), ends, strict=True):
        axes.annotate(
            name, (ticks[-1], value), xytext=(ticks[-1] * 1.12, place), textcoords="data", color=colour, va="center"
        )
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    # Room for the names.
    axes.set_xlim(ticks[0] * 0.9, ticks[-1] * 2.6)
    axes.grid(axis="y", color=GRID, linewidth=0.7)
    axes.set_xlabel("calibration rows a task")
    draws = max(len(point["by_seed"]) for points in over_rows.values() for point in points)
    bands = "bands: from the worst to the best draw of rows" if draws > 1 else "one draw of rows"
    said = bands if published is None else f"{bands}; dashed: the best published method"
    axes.set_title(said, loc="left", color=MUTED, fontsize=8.0)
    figure.suptitle(f"{zoo}: share of the experts' mean test score", x=0.01, ha="left", color=INK, fontsize=11.0)
    return figure


def _apart(values: Sequence[float], limits: tuple[float, float]) -> list[float]:
    """Return heights for labels beside `values`, moved upwards until no two of them overlap."""
    gap = (limits[1] - limits[0]) * 0.055
    places = list(values)
    below = float("-inf")
    for index in sorted(range(len(values)), key=values.__getitem__):
        places[index] = below = max(values[index], below + gap)
    return places
