"""The `bmm` command: words in, exit codes out (`flows.running`).

What a command does is in `flows.commands`, imported when it is called, so that `bmm --help` answers at once.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape

from bmm.errors import UserError
from flows import nightly_cli, store_cli
from flows.running import FreshOption, JsonOption, RecipeFile, ServerOption, StoreOption
from flows.running import err as _err
from flows.running import run as _run
from flows.running import say as _say

app = typer.Typer(
    name="bmm",
    help="Merge expert models fine-tuned from one base into one model that does all their jobs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(store_cli.app, name="store")
nightly_cli.add_to(app)


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
        _say(f"Wrote {escape(found['recipe'])} for {len(found['experts'])} experts.")
        for gap in found["to_complete"]:
            _say(f"  to complete: {escape(gap)}")
        _say(f"Next: [bold]bmm plan {escape(found['recipe'])}[/bold]")

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

        _say(*offline_summary(found) if offline else [plan_table(found)])

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

        _say(gram_table(found))
        if found["output"]:
            _say(f"published in {escape(found['output'])}")

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
    """Evaluate any checkpoint of the base's architecture on the recipe's tasks, with its heads or the experts'."""

    def work() -> dict[str, Any]:
        from flows import commands

        return commands.evaluate(model, recipe, split, store, samples, seed)

    def show(found: dict[str, Any]) -> None:
        from flows.show import calibration_table, evaluation_table

        _say(evaluation_table(found))
        if "samples" in found:
            _say(calibration_table(found))
            _say(f"reliability diagram: {escape(found['samples']['figure'])}")

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

    _run(work, as_json, lambda found: _say(f"report: {escape(found['report'])}"))


@app.command()
def schema(as_json: JsonOption = True) -> None:  # noqa: ARG001 - a schema is JSON, asked for or not
    """Print the JSON Schema of the recipe: every key, its default and what it means."""

    def work() -> dict[str, Any]:
        from bmm.recipe import Recipe

        return Recipe.model_json_schema()

    _run(work, True, lambda _: None)


@app.command()
def track(
    any_tracker: Annotated[
        bool, typer.Option("--any-tracker", help="also the records that were meant for another MLflow address")
    ] = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Log to MLflow the merges that could not be logged when they ended; exit 1 if it does not answer."""

    def work() -> dict[str, Any]:
        from flows import commands

        return commands.track(store, any_tracker=any_tracker)

    def show(found: dict[str, Any]) -> None:
        _say(f"{len(found['sent'])} records sent to {escape(found['tracker'])}")
        for one in found["waiting"]:
            _say(f"  waiting for {escape(one['tracker'])}: the merge {one['run'][:12]}")
        if found["error"]:
            _err.print(f"[red]bmm:[/red] {escape(found['error'])}", soft_wrap=True, highlight=False)

    _run(work, as_json, show, failed=lambda found: bool(found["error"]))


def _show_merge(found: dict[str, Any]) -> None:
    from flows.show import merge_summary

    document = json.loads((Path(found["output"]) / "merge.json").read_text(encoding="utf-8"))
    _say(*merge_summary(found, document))


def main() -> None:
    """Run the command line."""
    app()
