"""The page: self-contained, escaped, complete, and every number the document's."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
import yaml

from bmm.report.page import duration, flat, memory, recipe_yaml, report_page


class Page(HTMLParser):
    """Tags with their attributes, and the tables as rows of cell texts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.tables, self.open, self.cell = [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.cell = True
        elif tag == "small" and self.cell:
            self.tables[-1][-1][-1] += "|"

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.cell = None

    def handle_data(self, data):
        if self.cell:
            self.tables[-1][-1][-1] += data


@pytest.fixture
def no_figures(monkeypatch):
    """Leave the drawings out where a test is about the rest: they have tests of their own."""
    monkeypatch.setattr("bmm.report.page.figures", lambda _: {})


def test_the_same_document_gives_the_same_page(document, make):
    assert report_page(document) == report_page(make())


def test_nothing_is_fetched_and_nothing_is_run(document):
    text = report_page(document)
    page = Page(text)
    loading = {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "image",
        "base",
        "form",
        "video",
        "audio",
    }
    assert loading.isdisjoint(tag for tag, _ in page.tags)
    for _, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "srcset", "action"):
                assert value.startswith("#")
    assert not re.search(r"@import|url\((?!#)", text)


def test_a_hostile_name_stays_text(make):
    hostile = "<script>alert(1)</script>"
    document = make((hostile, "$x^2$ & \"quoted' --><b>"))
    document["experts"][0]["source"] = hostile
    document["environment"]["note"] = hostile
    document["recipe"]["output"] = "</pre>" + hostile
    text = report_page(document)
    assert "script" not in {tag for tag, _ in Page(text).tags}
    assert "<b>" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text


def test_the_tables_hold_the_documents_numbers(document, no_figures):
    tables = Page(report_page(document)).tables
    tasks = {row[0].split("|")[0]: row[1:] for row in tables[0][1:]}
    for name, entry in document["metrics"]["test"].items():
        if name == "mean":
            continue
        for cell, role in zip(tasks[name], ("base", "expert", "anchor", "merged"), strict=False):
            low, high = entry["intervals"][role]
            assert cell == f"{100 * entry[role]:.1f}|{100 * low:.1f}–{100 * high:.1f}"
        difference = float(tasks[name][4].replace("−", "-"))
        assert difference == pytest.approx(100 * (entry["merged"] - entry["expert"]), abs=0.0501)
        assert tasks[name][5] == str(entry["rows"])
    mean = document["metrics"]["test"]["mean"]
    assert tasks["mean over the tasks"][3] == f"{100 * mean['merged']:.1f}"
    assert tasks["share of the experts' mean"][3].split("|")[0] == f"{100 * mean['share_of_experts']['merged']:.1f}"
    methods = next(table for table in tables if table[0][0] == "method")
    assert sorted(row[1] for row in methods[1:]) == sorted(
        f"{100 * row['share_of_experts']['mean']:.1f}" for row in document["methods"]
    )
    trials = next(table for table in tables if table[0][0] == "trial")
    for row, trial in zip(trials[1:], document["search"]["trials"], strict=True):
        assert row[:4] == [
            str(trial["index"]),
            trial["origin"],
            trial["state"],
            f"{100 * trial['objective']:.1f}",
        ]
    coverage = next(table for table in tables if table[0][-1] == "condition number" and "shape" in table[0])
    for row, entry in zip(coverage[1:], document["coverage"], strict=True):
        assert row[:3] == [entry["parameter"], " × ".join(map(str, entry["shape"])), entry["treatment"]]
        assert row[4] == ("" if entry["lambda"] is None else f"{entry['lambda']:.2g}")
    conditions = next(table for table in tables if table[0] == ["parameter", "group", "λ", "condition number"])
    worst = sorted((e["condition"] for e in document["coverage"] if e["condition"]), reverse=True)
    assert [row[3] for row in conditions[1:]] == [f"{value:.3g}" for value in worst[:8]]


def test_every_digest_and_key_is_on_the_page(document, no_figures):
    text = report_page(document)
    digests = [document["recipe_digest"], document["base"]["digest"]]
    digests += [expert["digest"] for expert in document["experts"]]
    digests += [split["digest"] for splits in document["data"].values() for split in splits.values()]
    digests += [stage["key"] for stage in document["stages"].values()]
    assert all(f'title="{digest}"' in text for digest in digests)
    for words in ("cached", "apache-2.0", "are disjoint", "torch 2.13.0", "1.8 GiB"):
        assert words in text


def test_bad_news_is_on_the_page(document, no_figures):
    assert 'class="warnings"' not in report_page(document)
    document["metrics"]["test"]["mean"]["share_of_experts"]["merged"] = 0.9
    assert "the merged model is below its own anchor" in report_page(document)


@pytest.mark.parametrize(
    "missing", ["methods", "search", "coverage", "stages", "data", "environment", "peak_rss_bytes"]
)
def test_a_part_that_is_missing_is_left_out(document, missing, no_figures):
    del document[missing]
    text = report_page(document)
    assert "Each task, on its test rows" in text
    assert not re.search(r"\b(None|nan|Undefined)\b", text)


def test_without_intervals_trials_and_validation(document):
    del document["metrics"]["validation"]
    for entry in document["metrics"]["test"].values():
        del entry["intervals"]
    document["search"] = {"per": "type", "trials": [], "best": None}
    document["experts"][0]["license"] = None
    text = report_page(document)
    assert "unknown" in text
    assert not re.search(r"\b(None|nan)\b", text)


def test_a_merge_without_rows_says_so_and_shows_how_its_strengths_were_chosen(document, no_figures):
    chosen = document["search"]["best"]["settings"]
    document["search"] |= {"lambda": "evidence", "trials": [], "best": {"index": None, "settings": chosen}}
    document |= {"metrics": {}, "methods": [], "data": {name: {} for name in document["data"]}}
    document["grams"] = {"source": "task-vectors"}
    text = report_page(document)
    assert "the recipe names no test rows" in text
    assert "most probable given the experts" in text
    assert 'id="data"' not in text
    assert "the search saw" not in text
    (table,) = [rows for rows in Page(text).tables if rows[0] == ["module group", "λ", "γ"]]
    assert [row[0] for row in table[1:]] == list(chosen)


def test_failed_trials_have_a_dash(document, no_figures):
    document["search"]["trials"][5] |= {"state": "failed", "objective": None}
    trials = next(table for table in Page(report_page(document)).tables if table[0][0] == "trial")
    assert trials[6][2:4] == ["failed", "–"]


def test_the_recipe_reads_back(document):
    assert yaml.safe_load(recipe_yaml(document)) == document["recipe"]


def test_formats():
    assert [duration(value) for value in (0.44, 38.2, 250, 7500, None)] == [
        "0.4 s",
        "38 s",
        "4 min 10 s",
        "2 h 5 min",
        "–",
    ]
    assert [memory(value) for value in (None, 512, 2048, 5 * 2**20, 3 * 2**30)] == [
        "–",
        "512 B",
        "2 KiB",
        "5 MiB",
        "3.0 GiB",
    ]
    assert flat({"a": 1, "b": {"c": "x"}, "d": [1, 2]}) == "a 1, b c x, d [1, 2]"
