"""What every `bmm` command has in common: options, progress while it works, results, exit codes.

0 done, 1 failed, 2 the user's mistake (one sentence, no traceback). Results go to standard output, as text for people
or, with `--json`, as one JSON document; progress and notes go to standard error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from bmm.errors import BMMError, UserError
from flows import prefect_settings
from flows.console import shown

StoreOption = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="DIR|s3://…",
        help="the artefact store, a folder or s3://bucket/prefix (default: BMM_STORE, else the user's cache folder)",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="print one JSON document instead of text")]

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="the recipe's YAML file", show_default=False)]
FreshOption = Annotated[
    bool, typer.Option("--fresh/--resume", help="compute every stage anew, or take up what is finished (the default)")
]
ServerOption = Annotated[
    bool, typer.Option("--server/--no-server", help="run as a Prefect flow, or in this process without Prefect")
]

_out = Console()
err = Console(stderr=True)


def say(*parts: Any) -> None:
    """Print results for people: tables, and lines, which are never broken to fit the terminal."""
    for part in parts:
        _out.print(part, soft_wrap=isinstance(part, str))


def run(
    work: Callable[[], dict[str, Any]],
    as_json: bool,
    show: Callable[[dict[str, Any]], None],
    failed: Callable[[dict[str, Any]], bool] = lambda _: False,
) -> None:
    """Do a command's work with progress shown, print what it found, and exit with the right code."""
    prefect_settings.set_defaults()
    try:
        with shown(err, quiet=as_json):
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
        err.print(f"[red]bmm:[/red] {escape(message)}", soft_wrap=True, highlight=False)
    raise typer.Exit(code)
