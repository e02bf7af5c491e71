"""Figures: the same bytes each time, only those there is data for, nothing outside the canvas."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from bmm.errors import BMMError
from bmm.report.drawing import shorten, style
from bmm.report.figures import build, figures, png

LONG = ("a-task-name-of-exactly-forty-characters.", "W" * 64)


def outside(figure):
    """Every text that gets drawn (ticks beyond an axis's ends do not) and whose box leaves the canvas."""
    drawn = []
    original = Text.draw

    def record(text, *arguments, **keywords):
        drawn.append(text)
        return original(text, *arguments, **keywords)

    with style(), pytest.MonkeyPatch.context() as patch:
        canvas = FigureCanvasAgg(figure)
        patch.setattr(Text, "draw", record)
        canvas.draw()
        assert drawn
        renderer = canvas.get_renderer()
        width, height = figure.bbox.width, figure.bbox.height
        found = []
        for text in drawn:
            if not text.get_visible() or not text.get_text().strip():
                continue
            box = text.get_window_extent(renderer)
            if box.x0 < -0.5 or box.y0 < -0.5 or box.x1 > width + 0.5 or box.y1 > height + 0.5:
                found.append((text.get_text(), box.bounds))
        return found


@pytest.mark.parametrize(("count", "layers", "trials"), [(1, 1, 1), (2, 2, 3), (4, 6, 24), (9, 12, 40), (20, 48, 100)])
def test_no_text_leaves_the_canvas(make, count, layers, trials):
    names = (*LONG, *(f"task-{index}" for index in range(18)))[:count]
    built = build(make(names, layers=layers, trials=trials))
    assert set(built) == {"tasks", "methods", "search", "lambda"}
    for name, figure in built.items():
        assert outside(figure) == [], name


def test_no_text_leaves_the_canvas_with_odd_searches_and_long_module_names(document):
    for trial in document["search"]["trials"]:
        trial["objective"] = 0.3 if trial["index"] == 9 else trial["objective"]
        trial["origin"] = ("anchor", "global", "sobol", "bayesian", "an origin nobody knows")[trial["index"] % 5]
    for index, entry in enumerate(document["coverage"]):
        entry["parameter"] = entry["parameter"].replace("output.dense", "a.module.type.with.a.very.long.name.in.it")
        entry["parameter"] = ("text_model." if index % 2 else "vision_model.") + entry["parameter"]
    for name, figure in build(document).items():
        assert outside(figure) == [], name


def test_the_same_document_gives_the_same_bytes(document, make):
    assert figures(document) == figures(make())
    assert png("tasks", document) == png("tasks", make())
    assert png("tasks", document).startswith(b"\x89PNG")


def test_figures_are_well_formed_and_refer_to_nothing_outside_of_themselves(document):
    seen: set[str] = set()
    for text in figures(document).values():
        ElementTree.fromstring(text)  # noqa: S314
        ids = set(re.findall(r'\bid="([^"]+)"', text))
        used = set(re.findall(r'href="#([^"]+)"', text)) | set(re.findall(r"url\(#([^)]+)\)", text))
        assert used <= ids
        assert not ids & seen
        seen |= ids
        assert not re.search(r'href="(?!#)|<!DOCTYPE|<metadata|Matplotlib', text)


def test_figures_without_data_are_left_out(document):
    document["methods"] = []
    document["search"] = {"per": "type", "trials": [], "best": None}
    document["coverage"] = []
    assert set(figures(document)) == {"tasks"}
    with pytest.raises(BMMError, match="'search'"):
        png("search", document)
    with pytest.raises(BMMError, match="'pie'"):
        png("pie", document)


def test_missing_intervals_and_failed_trials_are_no_obstacle(document):
    for split in document["metrics"].values():
        for entry in split.values():
            del entry["intervals"]
    for row in document["methods"]:
        row["share_of_experts"] = {"mean": row["share_of_experts"]["mean"]}
    document["search"]["trials"][3] |= {"state": "failed", "objective": None}
    assert set(figures(document)) == {"tasks", "methods", "search", "lambda"}


def test_a_users_own_matplotlib_settings_change_nothing(document):
    import matplotlib

    expected = figures(document)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red"}):
        assert figures(document) == expected


def test_bars_are_as_long_as_the_documents_numbers(document):
    bars = [patch.get_width() for patch in build(document)["tasks"].axes[0].patches]
    tasks = [entry for name, entry in document["metrics"]["test"].items() if name != "mean"]
    expected = [100 * entry[role] for entry in tasks for role in ("base", "anchor", "merged", "expert")]
    assert bars == pytest.approx(expected)


def test_shorten_keeps_both_ends():
    assert shorten("short", 10) == "short"
    cut = shorten("abcdefghijklmnopqrstuvwxyz", 10)
    assert len(cut) == 10
    assert cut.startswith("abc")
    assert cut.endswith("z")
