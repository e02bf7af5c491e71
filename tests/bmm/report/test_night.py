"""A night in words and one table."""

from __future__ import annotations

from typing import Any

from bmm.report.night import gate_cells, gate_table, night_markdown

NEW = {"task": "mail", "rows": 60, "new": 0.5}
FIRST: dict[str, Any] = {**NEW, "champion": None, "difference": None, "low": None, "high": None, "floor": None}


def test_a_first_champions_table_has_no_columns_that_say_nothing() -> None:
    assert (
        gate_table({"rows": [{**FIRST, "note": ""}]})
        == "| task | rows | new |\n| --- | ---: | ---: |\n| mail | 60 | 50.0 |"
    )


def test_a_column_stays_where_one_row_needs_it() -> None:
    compared = {**NEW, "champion": 0.45, "difference": 0.05, "low": -0.1, "high": 0.2, "floor": None, "note": ""}
    columns, rows = gate_cells({"rows": [{**FIRST, "note": "new task"}, compared]})
    assert columns == ["task", "rows", "champion", "new", "difference", "interval", ""]
    assert rows[0] == ["mail", "60", "", "50.0", "", "", "new task"]
    assert rows[1] == ["mail", "60", "45.0", "50.0", "+5.0", "-10.0 to +20.0", ""]


def test_the_headline_comes_first_and_the_table_follows() -> None:
    found = {"outcome": "promoted", "model": "team", "version": "1", "gate": {"rows": [{**FIRST, "note": ""}]}}
    said = night_markdown({**found, "output": "merged"}).split("\n\n")
    assert said[0] == "**team: version 1 is the new champion**"
    assert said[1].startswith("| task |")
    assert said[2] == "champion in: `merged`"
