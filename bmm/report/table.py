"""The result as tables for a terminal of 80 columns; the numbers are the report's.

Names are shown as they are: no console markup is read from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from bmm.report import findings, notation
from bmm.report.findings import Document

ROLES = ("base", "expert", "anchor", "merged")
HIGHLIGHT = "bold cyan"


def console_table(document: Document) -> Group:
    """Return what a terminal shows at the end of a merge: tasks, methods, and what must not be overlooked."""
    measured = bool(findings.tasks(document))
    parts: list[Table | Text] = [task_table(document) if measured else Text(findings.unmeasured(document))]
    if findings.methods(document):
        parts += [Text(""), method_table(document)]
    parts += [Text(f"! {warning}", style="yellow") for warning in findings.warnings(document)]
    return Group(*parts)


def task_table(document: Document) -> Table:
    """Return one row a task: base, expert, anchor and merged in per cent, and merged − expert in points."""
    word = findings.metric_word(document)
    table = _table(f"Test {word} by task, %", caption=_share_line(document))
    table.add_column("task", overflow="fold", ratio=1)
    for role in ROLES:
        table.add_column(role, justify="right", no_wrap=True, style=HIGHLIGHT if role == "merged" else None)
    table.add_column("Δ expert", justify="right", no_wrap=True)
    for name, entry in findings.tasks(document).items():
        _add_task(table, f"{name} ({entry['metric']})" if word == "score" and "metric" in entry else name, entry)
    mean = findings.mean(document)
    if mean:
        table.add_section()
        _add_task(table, "mean", mean)
        shares = {role: findings.share(document, role)[0] for role in ("base", "anchor", "merged")}
        if shares["merged"] is not None:
            _add_task(table, "share of the experts' mean", {**shares, "expert": 1.0}, difference=False)
    return table


def method_table(document: Document) -> Table:
    """Return one row a method by its share of the experts' mean, best first, the merged model highlighted."""
    table = _table("Share of the experts' mean test score, %")
    table.add_column("method", overflow="fold", ratio=1)
    table.add_column("share", justify="right", no_wrap=True)
    table.add_column(f"{findings.confidence(document)} interval", justify="right", no_wrap=True)
    table.add_column("mean score", justify="right", no_wrap=True)
    for row in findings.methods(document):
        cells = (
            row.label,
            notation.number(row.share),
            notation.interval_text(row.interval),
            notation.number(row.mean),
        )
        table.add_row(*map(Text, cells), style=HIGHLIGHT if row.method == "merged" else None)
    return table


def _table(title: str, caption: str | None = None) -> Table:
    return Table(
        title=Text(title, style="bold"),
        caption=None if caption is None else Text(caption),
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        width=80,
        pad_edge=False,
    )


def _add_task(table: Table, name: str, entry: Mapping[str, Any], *, difference: bool = True) -> None:
    merged, expert = entry.get("merged"), entry.get("expert")
    delta = "" if merged is None or expert is None or not difference else notation.points(merged - expert)
    table.add_row(Text(name), *(Text(notation.number(entry.get(role))) for role in ROLES), Text(delta))


def _share_line(document: Document) -> str | None:
    value, interval = findings.share(document, "merged")
    if value is None:
        return None
    kept = notation.percent_with_interval(value, interval)
    return f"The merged model keeps {kept} of the experts' mean."
