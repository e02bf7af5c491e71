"""The `bmm` command: words in, exit codes out.

0 done, 1 failed, 2 the user's mistake (one sentence, no traceback). Results go to standard output, as text for people
or, with `--json`, as one JSON document; progress and notes go to standard error. What a command does is in
`flows.commands`, imported when it is called, so that `bmm --help` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

from bmm.errors import BMMError, UserError
from flows import prefect_settings
from flows.console import shown

app = typer.Typer(
    name="bmm",
    help="Merge expert models fine-tuned from one base into one model that does all their jobs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
store_app = typer.Typer(help="Look after the artefact store, where finished work is kept.", no_args_is_help=True)
app.add_typer(store_app, name="store")

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="the recipe's YAML file", show_default=False)]
StoreOption = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="DIR|s3://…",
        help="the artefact store, a folder or s3://bucket/prefix (default: BMM_STORE, else the user's cache folder)",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="print one JSON document instead of text")]
FreshOption = Annotated[
    bool, typer.Option("--fresh/--resume", help="compute every stage anew, or take up what is finished (the default)")
]
ServerOption = Annotated[
    bool, typer.Option("--server/--no-server", help="run as a Prefect flow, or in this process without Prefect")
]

_out = Console()
_err = Console(stderr=True)


@app.command()
def demo(
    folder: Annotated[
        Path | None,
        typer.Argument(
            help="where base, data, experts and the merged model go (default: demo, or demo-vision)", show_default=False
        ),
    ] = None,
    zoo: Annotated[
        Literal["text", "vision"], typer.Option(help="a text encoder and text sets, or a vision encoder and image sets")
    ] = "text",
    experts: Annotated[
        Literal["four", "all"], typer.Option(help="four experts, trained briefly; or all six, trained longer")
    ] = "four",
    store: StoreOption = None,
    fresh: FreshOption = False,
    server: ServerOption = True,
    as_json: JsonOption = False,
) -> None:
    """Fetch a base and data, fine-tune real experts, merge them, and show what each task lost or won."""

    def work() -> dict[str, Any]:
        from flows import commands

        place = folder or Path("demo" if zoo == "text" else f"demo-{zoo}")
        recipe = commands.prepare_demo(place, zoo, experts)
        if not as_json:
            _err.print(f"[dim]recipe: {escape(str(recipe))}[/dim]", soft_wrap=True)
        # The demo is a folder that can be deleted as a whole, so its store lies inside unless one is named.
        kept = store or os.environ.get("BMM_STORE") or str(place.resolve() / "store")
        return commands.merge(recipe, kept, fresh=fresh, server=server)

    _run(work, as_json, lambda found: _show_merge(found))


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="a folder that holds a base, experts and their data")],
    force: Annotated[bool, typer.Option("--force", help="replace a recipe that is there already")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a commented recipe for the experts in DIR."""

    def work() -> dict[str, Any]:
        from flows import commands

        return commands.init(folder, force=force)

    def show(found: dict[str, Any]) -> None:
        _out.print(f"Wrote {escape(found['recipe'])} for {len(found['experts'])} experts.", soft_wrap=True)
        for gap in found["to_complete"]:
            _out.print(f"  to complete: {escape(gap)}", soft_wrap=True)
        _out.print(f"Next: [bold]bmm plan {escape(found['recipe'])}[/bold]", soft_wrap=True)

    _run(work, as_json, show)


@app.command()
def plan(
    recipe: RecipeFile,
    offline: Annotated[
        bool, typer.Option("--offline", help="check all that can be known without the network, weights or rows")
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="with --offline: the base's config.json, for what the merge will take"),
    ] = None,
    store: StoreOption = None,
    fresh: FreshOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show the stages, what is cached, and the memory and disk that the rest needs; refuse what does not fit."""

    def work() -> dict[str, Any]:
        from flows import commands

        if config is not None and not offline:
            raise UserError("--config is for --offline; without it the base itself is asked")
        return commands.plan_offline(recipe, config) if offline else commands.plan(recipe, store, fresh=fresh)

    def show(found: dict[str, Any]) -> None:
        from flows.show import offline_summary, plan_table

        for part in offline_summary(found) if offline else [plan_table(found)]:
            _out.print(part, soft_wrap=isinstance(part, str))

    _run(work, as_json, show)


@app.command()
def merge(
    recipe: RecipeFile,
    store: StoreOption = None,
    fresh: FreshOption = False,
    server: ServerOption = True,
    as_json: JsonOption = False,
) -> None:
    """Merge the recipe's experts into one model; what is finished already is not done again."""

    def work() -> dict[str, Any]:
        from flows import commands

        return commands.merge(recipe, store, fresh=fresh, server=server)

    _run(work, as_json, lambda found: _show_merge(found))


@app.command()
def grams(
    recipe: RecipeFile,
    output: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="publish them there, a folder an expert, for recipes on other machines"),
    ] = None,
    store: StoreOption = None,
    fresh: FreshOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compute the experts' Gram matrices alone; any recipe with the same experts and data uses them again."""

    def work() -> dict[str, Any]:
        from flows import commands

        return commands.grams(recipe, store, fresh=fresh, output=output)

    def show(found: dict[str, Any]) -> None:
        from flows.show import gram_table

        _out.print(gram_table(found))
        if found["output"]:
            _out.print(f"published in {escape(found['output'])}", soft_wrap=True)

    _run(work, as_json, show)


@app.command(name="eval")
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="a checkpoint folder or hub-id@revision")],
    recipe: RecipeFile,
    split: Annotated[Literal["validation", "test"], typer.Option(help="the rows to evaluate on")] = "test",
    samples: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            min=1,
            help="of the recipe's own merge: also draw K models from its posterior, average their probabilities, and "
            "compare their calibration with the merged model's; draws a reliability diagram into MODEL",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="of the draws (default: the recipe's search.seed)", show_default=False)
    ] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Evaluate any checkpoint of the base's architecture on the recipe's tasks, with the experts' heads."""

    def work() -> dict[str, Any]:
        from flows import commands

        return commands.evaluate(model, recipe, split, store, samples, seed)

    def show(found: dict[str, Any]) -> None:
        from flows.show import calibration_table, evaluation_table

        _out.print(evaluation_table(found))
        if "samples" in found:
            _out.print(calibration_table(found))
            _out.print(f"reliability diagram: {escape(found['samples']['figure'])}", soft_wrap=True)

    _run(work, as_json, show)


@app.command()
def report(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="a merge's output folder, or the recipe of a finished merge")
    ],
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Rebuild report.html and the model card of a finished merge from its artefacts."""

    def work() -> dict[str, Any]:
        from flows import commands

        return commands.report(run, store)

    _run(work, as_json, lambda found: _out.print(f"report: {escape(found['report'])}", soft_wrap=True))


@app.command()
def schema(as_json: JsonOption = True) -> None:  # noqa: ARG001 - a schema is JSON, asked for or not
    """Print the JSON Schema of the recipe: every key, its default and what it means."""

    def work() -> dict[str, Any]:
        from bmm.recipe import Recipe

        return Recipe.model_json_schema()

    _run(work, True, lambda _: None)


@store_app.command(name="ls")
def store_ls(store: StoreOption = None, as_json: JsonOption = False) -> None:
    """List the artefacts: kind, key, size, age and when last used."""

    def work() -> dict[str, Any]:
        from flows import commands

        return commands.store_list(store)

    def show(found: dict[str, Any]) -> None:
        from flows.show import store_table

        _out.print(store_table(found))

    _run(work, as_json, show)


@store_app.command(name="verify")
def store_verify(store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Read every artefact and name the damaged ones; exit 1 if there are any. The next merge makes them again."""

    def work() -> dict[str, Any]:
        from flows import commands

        return commands.store_verify(store)

    def show(found: dict[str, Any]) -> None:
        for entry in found["damaged"]:
            _out.print(f"[red]damaged[/red] {escape(entry['reason'])}", soft_wrap=True)
        _out.print(f"{found['checked']} artefacts checked, {len(found['damaged'])} damaged.")

    _run(work, as_json, show, failed=lambda found: bool(found["damaged"]))


@store_app.command(name="prune")
def store_prune(
    older_than: Annotated[
        float, typer.Option(metavar="DAYS", min=0, help="remove what was last used longer ago")
    ] = 30.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would go")] = False,
    copies: Annotated[
        bool, typer.Option("--copies", help="of an object store: only this machine's copies, nothing in the bucket")
    ] = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove artefacts that were not used for a while, and what killed runs left behind."""

    def work() -> dict[str, Any]:
        from flows import commands

        return commands.store_prune(store, older_than, dry_run=dry_run, copies=copies)

    def show(found: dict[str, Any]) -> None:
        verb = "would remove" if dry_run else "removed"
        _out.print(f"{verb} {found['artefacts']} artefacts, {found['bytes'] / 2**20:.1f} MiB")
        if found["copies"]:
            _out.print(f"{verb} {found['copies']} copies on this machine, {found['copy_bytes'] / 2**20:.1f} MiB")

    _run(work, as_json, show)


def _show_merge(found: dict[str, Any]) -> None:
    from flows.show import merge_summary

    document = json.loads((Path(found["output"]) / "merge.json").read_text(encoding="utf-8"))
    for part in merge_summary(found, document):
        _out.print(part, soft_wrap=isinstance(part, str))


def _run(
    work: Callable[[], dict[str, Any]],
    as_json: bool,
    show: Callable[[dict[str, Any]], None],
    failed: Callable[[dict[str, Any]], bool] = lambda _: False,
) -> None:
    """Do a command's work with progress shown, print what it found, and exit with the right code."""
    prefect_settings.set_defaults()
    try:
        with shown(_err, quiet=as_json):
            found = work()
        if as_json:
            sys.stdout.write(json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        else:
            show(found)
    except UserError as error:
        _fail(str(error), 2, as_json)
    except (BMMError, FloatingPointError, MemoryError, OSError) as error:
        _fail(str(error) or type(error).__name__, 1, as_json)
    except KeyboardInterrupt:
        _fail("stopped; run the same command again to carry on where it stopped", 1, as_json)
    if failed(found):
        raise typer.Exit(1)


def _fail(message: str, code: int, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps({"error": message, "exit_code": code}, ensure_ascii=False) + "\n")
    else:
        _err.print(f"[red]bmm:[/red] {escape(message)}", soft_wrap=True, highlight=False)
    raise typer.Exit(code)


def main() -> None:
    """Run the command line."""
    app()
