"""`bmm nightly`, `deploy`, `promote`, `rollback`: words in, exit codes out; the work is in `flows.nightly_commands`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.markup import escape

from flows.running import FreshOption, JsonOption, RecipeFile, ServerOption, StoreOption
from flows.running import run as _run
from flows.running import say as _say

WhoOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="who does it, for the record (default: the login name)")
]
WhyOption = Annotated[str, typer.Option(metavar="TEXT", help="the reason, for the record")]


def add_to(app: typer.Typer) -> None:
    """Give a command line these commands."""
    for command in (nightly, deploy, promote, rollback):
        app.command()(command)


def nightly(
    recipe: RecipeFile,
    store: StoreOption = None,
    fresh: FreshOption = False,
    server: ServerOption = True,
    as_json: JsonOption = False,
) -> None:
    """Carry out one night by hand: merge what has changed, promote what is better, tell people."""

    def work() -> dict[str, Any]:
        from flows import nightly_commands as commands

        return commands.nightly(recipe, store, fresh=fresh, server=server)

    def show(found: dict[str, Any]) -> None:
        from flows.show import night_summary

        _say(*night_summary(found))

    _run(work, as_json, show)


def deploy(
    recipe: RecipeFile,
    serve: Annotated[
        bool,
        typer.Option(
            "--serve", help="also run a worker here, and a Prefect server unless one is configured, until Ctrl-C"
        ),
    ] = False,
    pool: Annotated[str, typer.Option(metavar="NAME", help="Prefect's work pool, made if there is none")] = "bmm",
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Have Prefect merge the recipe's experts every night, as `nightly.schedule` says."""

    def show(found: dict[str, Any]) -> None:
        from flows.show import left_out_lines

        at = found["schedule"]
        _say(f"[bold]deployed[/bold] {escape(', '.join(found['deployments']))}")
        _say(f"  at {escape(found['server'])}, nights at '{at['cron']}' {at['timezone']}")
        _say(*left_out_lines(found))
        if not serve:
            _say(f"Next, where the work is to be done: [bold]prefect worker start --pool {pool}[/bold]")

    def ready(found: dict[str, Any]) -> None:
        show(found)
        page = str(found["server"]).removesuffix("/api")
        _say(f"Working at {page} until Ctrl-C.")

    def work() -> dict[str, Any]:
        from flows import nightly_commands as commands

        return commands.deploy(recipe, store, pool, serve=serve, ready=ready)

    _run(work, as_json, (lambda _: None) if serve else show)


def promote(
    recipe: RecipeFile,
    version: Annotated[
        str | None, typer.Option(metavar="N", help="of the registered model (default: the challenger)")
    ] = None,
    who: WhoOption = None,
    why: WhyOption = "by hand",
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a version of the recipe's model the champion, whatever the gate says of it."""

    def work() -> dict[str, Any]:
        from flows import nightly_commands as commands

        return commands.promote(recipe, store, version, who, why)

    _run(work, as_json, _show_standing)


def rollback(
    recipe: RecipeFile,
    who: WhoOption = None,
    why: WhyOption = "by hand",
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make the version that the champion replaced the champion again; no night brings the other one back."""

    def work() -> dict[str, Any]:
        from flows import nightly_commands as commands

        return commands.roll_back(recipe, store, who, why)

    _run(work, as_json, _show_standing)


def _show_standing(found: dict[str, Any]) -> None:
    at = ", ".join(f"{name}: {found[name] or 'none'}" for name in ("champion", "previous", "challenger"))
    _say(f"{escape(found['model'])} at {escape(found['registry'])}: {at}")
    _say(f"[bold]champion[/bold] in {escape(found['output'])}")
