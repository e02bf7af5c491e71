"""The reliability diagram of a merge and of models drawn around it: how often they are right when they are how sure.

Two panels, probabilities as the models give them and after one temperature each; below them how many rows lie where.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bmm.report.drawing import COLOURS, GRID, MUTED, WIDTH, png_bytes, style

_HEIGHT = 5.6
_PANELS = {"before": "as they are", "after": "with one temperature each"}
_MODELS = {
    "posterior_mean": {"color": COLOURS["merged"], "marker": "o", "markersize": 6.5, "linewidth": 1.8},
    "sampled": {"color": "#d55e00", "marker": "s", "markersize": 4.5, "linewidth": 1.1, "markerfacecolor": "white"},
}


def reliability_png(samples: Mapping[str, Any], split: str) -> bytes:
    """Return the diagram as PNG.

    Args:
        samples: what `bmm.stages.sample.evaluate_samples` returned.
        split: whose rows these are.
    """
    with style():
        figure = reliability_figure(samples, split)
    return png_bytes(figure)


def reliability_figure(samples: Mapping[str, Any], split: str) -> Figure:
    """Return the diagram as a figure; takes what `reliability_png` does."""
    figure = Figure(figsize=(WIDTH, _HEIGHT), layout="constrained", facecolor="white")
    panels = figure.subplots(2, 2, sharex=True, sharey="row", height_ratios=[3.6, 1])
    for column, (when, title) in enumerate(_PANELS.items()):
        upper, lower = panels[:, column]
        _frame(upper, lower)
        for model, look in _MODELS.items():
            bins = samples["reliability"][when][model]
            name = "merged model" if model == "posterior_mean" else f"{samples['count']} draws, averaged"
            figures = samples[when]["mean"][model]
            said = f"{name}{_temperature(samples, when, model)}\n"
            said += f"NLL {figures['nll']['value']:.3f}, ECE {figures['ece']['value']:.3f}"
            upper.plot(*_points(bins), label=said, clip_on=False, **look)
            edges, shares = _histogram(bins, samples["bins"])
            filled = model == "posterior_mean"
            lower.stairs(shares, edges, fill=filled, color=look["color"], alpha=0.35 if filled else 1, linewidth=1.1)
        # Above the panel, where no curve can run through it.
        upper.legend(
            title=f"Probabilities {title}",
            title_fontproperties={"size": 9.5, "weight": "bold"},
            alignment="left",
            loc="lower left",
            bbox_to_anchor=(-0.03, 1.0),
            frameon=False,
            fontsize=8,
            labelspacing=0.6,
            handlelength=1.8,
        )
        lower.set_ylim(bottom=0)
        lower.set_xlabel("confidence in the first choice, %")
        if column == 0:
            upper.set_ylabel("right, %")
            lower.set_ylabel("rows, %")
    figure.suptitle(
        f"How often the first choice is right, by its probability: {split} rows, {samples['bins']} bins, tasks alike\n",
        x=0.01,
        ha="left",
        size=9,
        color=MUTED,
    )
    return figure


def _frame(upper: Axes, lower: Axes) -> None:
    for axes in (upper, lower):
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.set_axisbelow(True)
        axes.grid(color=GRID, linewidth=0.7)
    upper.plot([0, 100], [0, 100], color=MUTED, linewidth=0.8, linestyle=(0, (3, 3)), zorder=0)
    upper.set_xlim(0, 100)
    upper.set_ylim(0, 100)
    upper.set_aspect("equal")


def _points(bins: Sequence[Mapping[str, float]]) -> tuple[list[float], list[float]]:
    return [100 * entry["confidence"] for entry in bins], [100 * entry["accuracy"] for entry in bins]


def _histogram(bins: Sequence[Mapping[str, float]], count: int) -> tuple[list[float], list[float]]:
    """Return the edges of all bins and the share of rows in each, in per cent."""
    shares = {int(entry["bin"]): 100 * entry["share"] for entry in bins}
    return [100 * place / count for place in range(count + 1)], [shares.get(place, 0.0) for place in range(count)]


def _temperature(samples: Mapping[str, Any], when: str, model: str) -> str:
    return f", T = {samples['temperature'][model]:.2f}" if when == "after" else ""
