"""The console tables: 80 columns, the document's numbers, names shown as they are."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from bmm.report.table import HIGHLIGHT, console_table, method_table


def shown(document, width=80):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(console_table(document))
    return console.file.getvalue()


def test_the_rows_hold_the_documents_numbers(document):
    lines = {line.split()[0]: line.split()[1:] for line in shown(document).splitlines() if line.split()}
    for name, entry in document["metrics"]["test"].items():
        values = [f"{100 * entry[role]:.1f}" for role in ("base", "expert", "anchor", "merged")]
        assert lines[name][:4] == values
        difference = float(lines[name][4].replace("−", "-"))
        assert difference == pytest.approx(100 * (entry["merged"] - entry["expert"]), abs=0.0501)
    assert lines["WUDI"][:2] == ["96.9", "95.8–98.0"]


def test_the_share_has_its_interval(document):
    mean = document["metrics"]["test"]["mean"]
    low, high = mean["intervals"]["share_of_experts"]["merged"]
    kept = f"{100 * mean['share_of_experts']['merged']:.1f} % ({100 * low:.1f}–{100 * high:.1f})"
    assert f"The merged model keeps {kept} of the experts' mean." in shown(document)


@pytest.mark.parametrize("count", [1, 2, 20])
def test_eighty_columns_are_enough_and_nothing_is_cut(make, count):
    names = ("a-task-name-of-exactly-forty-characters.", "t" * 64, *(f"task-{index}" for index in range(18)))[:count]
    text = shown(make(names))
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    folded = "".join(line.split()[0] for line in text.splitlines() if line.split())
    assert "a-task-name-of-exactly-forty-characters." in folded


def test_markup_in_a_name_is_text(make):
    assert "[red]x[/red]" in shown(make(("[red]x[/red]", "[/]")))


def test_merged_is_highlighted_and_methods_are_sorted(document):
    table = method_table(document)
    assert [row.style for row in table.rows].count(HIGHLIGHT) == 1
    assert table.rows[1].style == HIGHLIGHT


def test_missing_parts_and_bad_news(document):
    document["methods"] = []
    for entry in document["metrics"]["test"].values():
        entry["intervals"] = {}
    document["metrics"]["test"]["mean"]["share_of_experts"]["merged"] = 0.5
    text = shown(document)
    assert "method" not in text
    assert "keeps 50.0 % of the experts' mean." in text
    assert "! On the test split the merged model is below its own anchor" in text
