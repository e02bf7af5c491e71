"""`bmm store`: words in, exit codes out; what the commands do is in `flows.store_commands`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.markup import escape

from flows.running import JsonOption, StoreOption
from flows.running import run as _run
from flows.running import say as _say

app = typer.Typer(help="Look after the artefact store, where finished work is kept.", no_args_is_help=True)


@app.command(name="ls")
def store_ls(store: StoreOption = None, as_json: JsonOption = False) -> None:
    """List the artefacts: kind, key, size, age and when last used."""

    def work() -> dict[str, Any]:
        from flows import store_commands as commands

        return commands.store_list(store)

    def show(found: dict[str, Any]) -> None:
        from flows.show import store_table

        _say(store_table(found))

    _run(work, as_json, show)


@app.command(name="verify")
def store_verify(
    mend: Annotated[
        bool, typer.Option("--mend/--no-mend", help="remove what is damaged, or leave it where it is to be looked at")
    ] = True,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read every artefact and remove the damaged ones, which the next merge makes again; exit 1 if there are any."""

    def work() -> dict[str, Any]:
        from flows import store_commands as commands

        return commands.store_verify(store, mend=mend)

    def show(found: dict[str, Any]) -> None:
        for entry in found["damaged"]:
            what = f"{'removed; ' if entry['removed'] else ''}the stage {entry['made_by']} makes it again"
            _say(f"[red]damaged[/red] {escape(entry['reason'])} ({what})")
        removed = sum(entry["removed"] for entry in found["damaged"])
        _say(f"{found['checked']} artefacts checked, {len(found['damaged'])} damaged, {removed} removed.")

    _run(work, as_json, show, failed=lambda found: bool(found["damaged"]))


@app.command(name="prune")
def store_prune(
    older_than: Annotated[
        float | None,
        typer.Option(metavar="DAYS", min=0, help="remove what was last used longer ago (30, if no limit is given)"),
    ] = None,
    keep_runs: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="remove what only merges older than the last N were made from"),
    ] = None,
    max_bytes: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="remove what was used longest ago, until no more is left (200GiB)"),
    ] = None,
    registry: Annotated[
        bool,
        typer.Option(
            "--registry/--no-registry",
            help="keep what the MLflow registry's champion, previous and challenger models need, or don't ask",
        ),
    ] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would go, and how many bytes")] = False,
    copies: Annotated[
        bool, typer.Option("--copies", help="of an object store: only this machine's copies, nothing in the bucket")
    ] = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove old artefacts, and what killed runs left; never what a champion, a running merge or a record needs."""

    def work() -> dict[str, Any]:
        from flows import store_commands as commands

        return commands.store_prune(
            store, older_than, keep_runs, max_bytes, dry_run=dry_run, copies=copies, registry=registry
        )

    def show(found: dict[str, Any]) -> None:
        from flows.show import pruned_summary

        _say(*pruned_summary(found, dry_run=dry_run))

    _run(work, as_json, show)
