"""How figures look and how they become bytes: style, colours, deterministic SVG and PNG. What they show is in
figures.py and heatmap.py.

matplotlib's object interface only: no pyplot, no global state that outlives a call.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH = 7.2  # inches; shown 700 pixels wide, 9-point type is then about 12 pixels high

# Okabe and Ito's palette: told apart with any colour vision, and by lightness when printed grey.
COLOURS = {"base": "#c4c4c4", "anchor": "#e69f00", "merged": "#0072b2", "expert": "#4d4d4d"}
ORIGIN_COLOURS = {"anchor": "#b57a00", "global": "#009e73", "sobol": "#7a7a7a", "bayesian": "#0072b2"}
ORIGIN_COLOURS |= {"random": "#7a7a7a", "cma-es": "#56b4e9"}
ORIGIN_MARKERS = {"anchor": "D", "global": "s", "sobol": "o", "bayesian": "^", "random": "o", "cma-es": "v"}
OTHER_COLOUR, OTHER_MARKER = "#cc79a7", "v"
INK, MUTED, GRID = "#222222", "#666666", "#e2e2e2"

_STYLE = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9.0,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": "#aaaaaa",
    "axes.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": INK,
    "hatch.linewidth": 0.6,
    "svg.fonttype": "path",
}


@contextmanager
def style(salt: str = "bmm") -> Iterator[None]:
    """Use the project's style, whatever a user's own matplotlib settings say, for the length of the block."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({**_STYLE, "svg.hashsalt": salt})
        yield


def canvas(height: float) -> tuple[Figure, Axes]:
    """Return a figure of the common width and `height` inches, with one axes framed below only."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor="white")
    axes = figure.subplots()
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.set_axisbelow(True)
    return figure, axes


def shorten(text: str, length: int) -> str:
    """Return `text` on one line, cut in its middle where it is longer than `length` characters."""
    text = " ".join(text.split())
    if len(text) <= length:
        return text
    tail = (length - 1) // 3
    return text[: length - 1 - tail] + "…" + text[-tail:]


def svg(name: str, figure: Figure, title: str) -> str:
    """Return a figure as one `<svg>` element that may stand in a page beside others.

    No date, no creator, no document type, text as paths; every id begins with `name`, so that two figures in
    one page never borrow each other's clip paths.
    """
    buffer = io.StringIO()
    with style(f"bmm-{name}"):
        nothing: dict[str, Any] = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].rstrip() + "\n"
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    # Text drawn as paths leaves comments with the words; a name could close one early.
    text = re.sub(r"<!--.*?-->\n?", "", text, flags=re.DOTALL)
    return text.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)


def png_bytes(figure: Figure) -> bytes:
    """Return a figure as PNG, 1,080 pixels wide, without the drawing library's version in it."""
    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()
