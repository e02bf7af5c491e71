"""How results look on a terminal. Numbers are only put in place here."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from bmm.report.night import WORDS, gate_cells, headline
from bmm.report.table import console_table
from bmm.sizes import readable_bytes


def merge_summary(found: Mapping[str, Any], document: Mapping[str, Any]) -> list[RenderableType]:
    """Return what a person sees at the end of a merge: the tables, then where things are."""
    cached = [name for name, stage in found["stages"].items() if stage["state"] == "cached"]
    stages = "every stage cached" if len(cached) == len(found["stages"]) else _stages(found["stages"])
    lines: list[RenderableType] = [
        console_table(document),
        "",
        *(f"[yellow]note[/yellow]   {escape(note)}" for note in document["notes"]),
        f"[bold]model[/bold]   {escape(found['output'])}",
        f"[bold]report[/bold]  {escape(found['report'])}",
    ]
    if found["mlflow"]:
        lines.append(f"[bold]mlflow[/bold]  run {found['mlflow']['run_id']} at {escape(found['mlflow']['uri'])}")
        if found["mlflow_sent_later"]:
            lines.append(f"        and records of {found['mlflow_sent_later']} earlier merges that had waited")
    if found["mlflow_error"]:
        lines.append(
            f"[yellow]mlflow[/yellow]  not logged ({escape(found['mlflow_error'])}); the next merge tries again"
        )
    lines.append(f"[bold]time[/bold]    {found['seconds']:.1f} s; {stages}")
    return lines


def left_out_lines(found: Mapping[str, Any]) -> list[str]:
    """Return a line for each expert that a night does without."""
    return [f"[yellow]left out[/yellow]  {escape(name)}: {escape(why)}" for name, why in found["left_out"].items()]


def night_summary(found: Mapping[str, Any]) -> list[RenderableType]:
    """Return what a person sees at the end of a night: how it ended, the gate's table, then where things are."""
    lines: list[RenderableType] = [f"[bold]{found['outcome']}[/bold]  {escape(headline(found))}"]
    lines += [f"  {escape(reason)}" for reason in found["reasons"]]
    lines += left_out_lines(found)
    if "gate" in found:
        table = _table("scores on the test rows, in per cent")
        columns, rows = gate_cells(found["gate"])
        for name in columns:
            table.add_column(name, justify="left" if name in WORDS else "right")
        for row in rows:
            table.add_row(*map(escape, row))
        lines += ["", table]
    lines.append(f"[bold]champion[/bold]  {escape(found['output'])}")
    if found.get("report"):
        lines.append(f"[bold]report[/bold]    {escape(found['report'])}")
    stages = f"; {_stages(found['stages'])}" if found.get("stages") else ""
    lines.append(f"[bold]time[/bold]      {found['seconds']:.1f} s{stages}")
    return lines


def _stages(stages: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} cached" if stage["state"] == "cached" else f"{name} {stage['seconds']:.1f} s"
        for name, stage in stages.items()
    )


def plan_table(found: Mapping[str, Any]) -> Table:
    """Return the plan as a table."""
    free = found["free"]
    store = f"{readable_bytes(free['work'])} free in the store"
    if free["store"] is None:
        store = (
            f"{readable_bytes(free['work'])} free for copies on this machine (an object store's own room is unknown)"
        )
    table = _table(
        f"disk {readable_bytes(found['disk_bytes'])} of {store}, "
        f"{readable_bytes(found['output_bytes'])} for the output; "
        f"memory {readable_bytes(found['memory_bytes'])} of {readable_bytes(free['memory'])}"
    )
    _stage_columns(table, ("stage", "state", "disk", "memory", ""))
    for stage in found["stages"]:
        if stage["cached"]:
            table.add_row(stage["stage"], "[green]cached[/green]", "", "", "")
        else:
            table.add_row(stage["stage"], "to do", *_needs(stage))
    return table


def offline_summary(found: Mapping[str, Any]) -> list[RenderableType]:
    """Return what is known of a recipe without the network, what is not, and the estimate if there is one."""
    marks = {"checked": "[green]holds[/green]", "warnings": "[yellow]doubt[/yellow]", "not_checked": "[dim]open [/dim]"}
    lines: list[RenderableType] = [f"{mark}  {escape(line)}" for key, mark in marks.items() for line in found[key]]
    estimate = found["estimate"]
    if estimate is not None:
        disk, output, memory = (readable_bytes(estimate[f"{what}_bytes"]) for what in ("disk", "output", "memory"))
        table = _table(
            f"disk {disk} in the store, {output} for the output; memory {memory}; from {escape(estimate['config'])}"
        )
        _stage_columns(table, ("stage", "disk", "memory", ""))
        for stage in estimate["stages"]:
            table.add_row(stage["stage"], *_needs(stage))
        lines += ["", table]
    return lines


def _stage_columns(table: Table, names: Sequence[str]) -> None:
    for name in names:
        table.add_column(name, justify="right" if name in ("disk", "memory") else "left")


def _needs(stage: Mapping[str, Any]) -> tuple[str, str, str]:
    return readable_bytes(stage["disk_bytes"]), readable_bytes(stage["memory_bytes"]), stage["note"]


def gram_table(found: Mapping[str, Any]) -> Table:
    """Return the Gram artefacts as a table."""
    table = _table(f"{found['state']} in {found['seconds']:.1f} s")
    table.add_column("expert")
    table.add_column("matrices", justify="right")
    table.add_column("rows", justify="right")
    table.add_column("size", justify="right")
    table.add_column("artefact", overflow="fold")
    for entry in found["experts"]:
        table.add_row(
            escape(entry["expert"]),
            str(entry["matrices"]),
            f"{entry['rows']:,}",
            readable_bytes(entry["bytes"]),
            escape(entry["path"]),
        )
    return table


def evaluation_table(found: Mapping[str, Any]) -> Table:
    """Return a checkpoint's scores by task beside the experts'."""
    share = found["share_of_experts"]
    table = _table(
        f"{share['mean']:.1%} of the experts' mean ({share['low']:.1%} to {share['high']:.1%}), {found['split']} rows"
    )
    for name, justify in (("task", "left"), ("rows", "right"), ("expert", "right"), ("model", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for task, entry in found["tasks"].items():
        table.add_row(escape(task), str(entry["rows"]), f"{entry['expert']:.1%}", f"{entry['model']:.1%}")
    return table


def calibration_table(found: Mapping[str, Any]) -> Table:
    """Return how the drawn models' averaged probabilities compare with the merged model's, as means over tasks."""
    drawn = found["samples"]
    temperature = drawn["temperature"]
    table = _table(
        f"mean over tasks, {found['split']} rows, seed {drawn['seed']}; smaller is better; the temperature, fitted on "
        f"validation, is {temperature['posterior_mean']:.2f} for the merged model and {temperature['sampled']:.2f} for "
        "the draws"
    )
    names = {"nll": "NLL", "brier": "Brier", "ece": "ECE"}
    table.add_column("")
    for heading in (*names.values(), "accuracy"):
        table.add_column(heading, justify="right")
    for when, said in (("before", ""), ("after", ", with a temperature")):
        means = drawn[when]["mean"]
        for model, label in (("posterior_mean", "merged model"), ("sampled", f"{drawn['count']} draws, averaged")):
            figures = means[model]
            table.add_row(
                label + said,
                *(f"{figures[name]['value']:.4f}" for name in names),
                f"{figures['accuracy']['value']:.1%}",
            )
        gaps = means["difference"]
        table.add_row(
            "[dim]difference[/dim]",
            *(f"[dim]{gaps[name]['low']:+.4f} to {gaps[name]['high']:+.4f}[/dim]" for name in names),
            f"[dim]{gaps['accuracy']['low']:+.1%} to {gaps['accuracy']['high']:+.1%}[/dim]",
        )
    return table


def store_table(found: Mapping[str, Any]) -> Table:
    """Return the store's artefacts as a table."""
    table = _table(
        f"{len(found['artefacts'])} artefacts, {readable_bytes(found['bytes'])}, in {escape(found['store'])}"
    )
    table.add_column("kind")
    table.add_column("key")
    table.add_column("size", justify="right")
    table.add_column("made", justify="right")
    table.add_column("used", justify="right")
    for entry in found["artefacts"]:
        table.add_row(
            entry["kind"], entry["key"][:12], readable_bytes(entry["bytes"]), _ago(entry["made"]), _ago(entry["used"])
        )
    return table


def pruned_summary(found: Mapping[str, Any], *, dry_run: bool) -> list[RenderableType]:
    """Return what pruning removed, or would remove, by kind, and what stays."""
    verb = "would remove" if dry_run else "removed"
    parts: list[RenderableType] = []
    if found.get("kinds"):
        table = _table("")
        for name in ("kind", "artefacts", "size"):
            table.add_column(name, justify="left" if name == "kind" else "right")
        for kind, gone in found["kinds"].items():
            table.add_row(kind, str(gone["artefacts"]), readable_bytes(gone["bytes"]))
        parts.append(table)
    parts.append(f"{verb} {found['artefacts']} artefacts, {readable_bytes(found['bytes'])}")
    if "left_bytes" in found:
        parts.append(
            f"{readable_bytes(found['left_bytes'])} stay; {found['protected']} artefacts are protected "
            f"({len(found['models'])} models of the registry, runs at work, records to be sent)"
        )
        if found["over_bytes"]:
            parts.append(f"that is {readable_bytes(found['over_bytes'])} more than --max-bytes: the rest is protected")
    if found["copies"]:
        parts.append(f"{verb} {found['copies']} copies on this machine, {readable_bytes(found['copy_bytes'])}")
    return parts


def _table(caption: str) -> Table:
    return Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left", pad_edge=False)


def _ago(moment: float) -> str:
    seconds = max(0.0, time.time() - moment)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return "just now"
