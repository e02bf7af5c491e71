"""The map of the chosen prior strengths: a row a module type, a column a layer, from the coverage."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import matplotlib
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from bmm.report.drawing import MUTED, WIDTH, canvas, shorten
from bmm.report.findings import Document

_LAYER = re.compile(r"^(?P<stem>.*?)\.?\b(?P<layer>\d+)\.(?P<type>.+)$")
_SHORT = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.attention.query": "query",
    "attention.attention.key": "key",
    "attention.attention.value": "value",
    "attention.output.dense": "attention out",
    "intermediate.dense": "MLP in",
    "output.dense": "MLP out",
}
OUTSIDE = "–"
LEVELS = 48  # few enough that the colour bar is drawn as shapes and not embedded as an image


def place(parameter: str) -> tuple[str, str, str]:
    """Return stem, layer index and module type of a parameter's canonical name.

    `encoder.layer.3.output.dense.weight` is `("encoder.layer", "3", "MLP out")`; what stands outside of all
    layers gets the layer "–" and its whole name as the type.
    """
    name = parameter.removesuffix(".weight")
    match = _LAYER.match(name)
    if match is None:
        return "", OUTSIDE, name
    kind = match["type"]
    return match["stem"], match["layer"], _SHORT.get(kind, kind)


def cells(document: Document) -> dict[tuple[str, str], float | None]:
    """Return log10 λ by (module type, layer) for every matrix in a layer; None where the anchor stays.

    Matrices outside of the layers appear only when they were regressed. With several stems (a text and a
    vision tower, say) a type keeps its stem in front.
    """
    entries = [
        (place(entry["parameter"]), entry) for entry in document.get("coverage") or [] if len(entry["shape"]) >= 2
    ]
    stems = {stem for (stem, layer, _), _ in entries if layer != OUTSIDE}
    found: dict[tuple[str, str], float | None] = {}
    for (stem, layer, kind), entry in entries:
        value = _log10_lambda(entry)
        if layer == OUTSIDE and value is None:
            continue
        label = f"{stem} {kind}" if len(stems) > 1 and layer != OUTSIDE else kind
        found[label, layer] = value
    return found


def lambda_map(document: Document) -> Figure | None:
    """Draw log10 λ of every matrix as colour and, given room, as a number; hatched where the anchor stays."""
    found = cells(document)
    values = [value for value in found.values() if value is not None]
    if not values:
        return None
    kinds = list(dict.fromkeys(kind for kind, _ in found))
    layers = sorted(
        {layer for _, layer in found},
        key=lambda layer: (layer == OUTSIDE, int(layer) if layer.isdigit() else 0),
    )
    low, high = _limits(document, values)
    row = 0.34
    figure, axes = canvas(row * len(kinds) + 1.15)
    axes.spines["bottom"].set_visible(False)
    scale, palette = Normalize(low, high), matplotlib.colormaps["viridis"].resampled(LEVELS)
    colours = ScalarMappable(scale, palette)
    longest = max(len(shorten(kind, 34)) for kind in kinds)
    cell = (WIDTH - 0.6 - 0.075 * longest) / len(layers)
    for (kind, layer), value in found.items():
        x, y = layers.index(layer) - 0.5, kinds.index(kind) - 0.5
        if value is None:
            axes.add_patch(Rectangle((x, y), 1, 1, facecolor="#eeeeee", hatch="////", edgecolor="#bbbbbb", linewidth=0))
        else:
            axes.add_patch(Rectangle((x, y), 1, 1, facecolor=palette(scale(value)), edgecolor="white", linewidth=1))
        if cell >= 0.36:
            dark = value is not None and value < low + 0.5 * (high - low)
            axes.text(
                x + 0.5,
                y + 0.5,
                "anchor" if value is None and cell >= 0.6 else "" if value is None else _signed(value),
                ha="center",
                va="center",
                size=8,
                color="white" if dark else "#222222",
            )
    axes.set_xlim(-0.5, len(layers) - 0.5)
    axes.set_ylim(len(kinds) - 0.5, -0.5)
    axes.set_yticks(range(len(kinds)), [shorten(kind, 34) for kind in kinds])
    step = math.ceil(len(layers) / 24)
    axes.set_xticks(range(0, len(layers), step), layers[::step])
    axes.tick_params(length=0)
    axes.set_xlabel("layer")
    bar = figure.colorbar(colours, ax=axes, location="top", aspect=45, shrink=0.8, pad=0.04)
    bar.outline.set_visible(False)
    if bar.solids is not None:
        bar.solids.set_edgecolor("face")  # no seams between the shapes
    bar.ax.tick_params(length=2, labelsize=8)
    bar.set_label("← follow the experts' data        log₁₀ λ        keep the anchor →", color=MUTED, size=8.5)
    return figure


def _log10_lambda(entry: Mapping[str, Any]) -> float | None:
    value = entry.get("lambda")
    if entry["treatment"] != "regressed" or value is None or not 0 < value < math.inf:
        return None
    return math.log10(value)


def _limits(document: Document, values: list[float]) -> tuple[float, float]:
    """Return the colour scale: the range that was searched, widened where a value lies outside of it."""
    searched = document.get("recipe", {}).get("search", {}).get("log10_lambda") or (-4.0, 2.0)
    low, high = min(searched[0], *values), max(searched[1], *values)
    return (low, high) if low < high else (low - 1, high + 1)


def _signed(value: float) -> str:
    return f"{value:.1f}".replace("-", "−").replace("−0.0", "0.0")
