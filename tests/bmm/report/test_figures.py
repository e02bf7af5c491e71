"""Figures: the same bytes each time, only those there is data for, nothing outside the canvas."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from bmm.report.drawing import png_bytes, shorten, style, svg
from bmm.report.figures import TITLES, build, figures, pngs
from bmm.report.page import report_page
from bmm.report.takeaways import takeaways

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
    # What was drawn once is kept; so the other is drawn here.
    assert figures(document) == {name: svg(name, figure, TITLES[name]) for name, figure in build(make()).items()}
    drawn = pngs(document)
    assert drawn == {name: png_bytes(figure) for name, figure in build(make()).items()}
    assert drawn["tasks"].startswith(b"\x89PNG")


def test_figures_are_drawn_once_while_what_they_show_stays(document, monkeypatch):
    from bmm.report import figures as module

    drawn = []
    monkeypatch.setattr(module, "build", lambda read: drawn.append(read) or build(read))
    document["methods"][0]["method"] = "no-other-test-has-this"
    first = figures(document)
    assert set(pngs(document)) == set(first)
    document |= {"stages": {}, "mlflow": {"uri": "http://127.0.0.1", "run_id": "1"}}
    first["tasks"] = "changed by who asked"
    again = figures(document)
    assert set(pngs(document)) == set(again)
    assert len(drawn) == 2
    assert again["tasks"].startswith("<svg")
    document["metrics"]["test"]["mean"]["merged"] -= 0.1
    document["methods"][1]["share_of_experts"]["mean"] -= 0.1
    assert figures(document)["methods"] != again["methods"]
    assert len(drawn) == 3


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
    assert set(figures(document)) == set(pngs(document)) == {"tasks"}


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
        found = {name: svg(name, figure, TITLES[name]) for name, figure in build(document).items()}
    assert found == expected


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


def a_search(document: dict[str, Any], objective: str = "share-of-expert") -> dict[str, Any]:
    """The document's search with everything that a new one says."""
    scale = 1.0 if objective == "share-of-expert" else -0.6
    trials = []
    for index in range(16):
        origin = ("anchor", "global", "global", "sobol", "sobol", "bayesian")[min(index, 5)]
        value = 0.9 + 0.005 * (index % 7)
        trials.append(
            {
                "index": index,
                "origin": origin,
                "state": "stopped" if index in (9, 12) else "complete",
                "settings": {"model": {"lambda": 0.1, "gamma": 1.0, "rho": 0.4, "task_weights": {"a": 1.5}}},
                "objective": scale * value,
                "tasks": {"a": 0.7 + 0.01 * (index % 5), "b": 0.8 - 0.012 * (index % 5)},
                "variance": 1e-4,
                "seen": 0.5 if index in (9, 12) else 1.0,
            }
        )
    names = [f"{what} of {group}" for group in ("attention-out", "mlp-in", "qkv") for what in ("λ", "γ")]
    importance = [{"name": name, "share": 0.6 / (place + 1)} for place, name in enumerate(names)]
    search = {"objective": objective, "trials": trials, "expert": {"a": 0.8, "b": 0.85}, "importance": importance}
    best = {"index": 6, "objective": trials[6]["objective"], "settings": trials[6]["settings"]}
    return {**document, "search": {**document["search"], **search, "best": best}}


@pytest.mark.parametrize("objective", ["share-of-expert", "nll", "agreement"])
def test_a_search_shows_what_mattered_and_what_was_traded(document: dict[str, Any], objective: str) -> None:
    told = a_search(document, objective)
    assert {"search", "importance", "trades"} <= set(figures(told))
    said = takeaways(told)
    assert "λ of attention-out (60 %)" in said["importance"]
    assert "good for a tends to be bad for b (correlation −1.00" in said["trades"]
    assert "2 were stopped early" in said["search"]
    assert ("; by accuracy it keeps " in said["search"]) == (objective != "share-of-expert")
    assert "-" not in said["search"].replace("log-likelihood", "")
    told["search"]["split"] = "unlabelled"
    assert "it keeps" not in takeaways(told)["search"]
    page = report_page(told)
    assert "ρ 0.4, a × 1.5" in page
    assert ("objective, %" in page) == (objective == "share-of-expert")


def test_tasks_that_go_together_are_not_said_to_be_traded(document: dict[str, Any]) -> None:
    told = a_search(document)
    for trial in told["search"]["trials"]:
        trial["tasks"]["b"] = trial["tasks"]["a"]
    assert takeaways(told)["trades"].startswith("No two tasks")
    for place, trial in enumerate(told["search"]["trials"]):
        # As good as unrelated: a correlation of about −0.1.
        trial["tasks"] |= {"a": 0.7 + 0.01 * (place % 2), "b": 0.8 + 0.01 * (place // 2 % 2) - 0.001 * (place % 2)}
    assert takeaways(told)["trades"].startswith("No two tasks")
    told["search"]["trials"] = told["search"]["trials"][:3]
    assert "trades" not in takeaways(told)
    assert "trades" not in figures(told)
