"""Which experts the benchmarks run on: the project's own zoos, made once in a folder, or anybody's recipe."""

from __future__ import annotations

from pathlib import Path

from benchmarks.runs import Zoo

from bmm.errors import RecipeError
from bmm.zoo.layout import prepare
from bmm.zoo.splits import SplitSizes
from bmm.zoo.zoos import ZOOS

# As in the demo, but a pool of calibration rows from which several draws can be taken.
SIZES = SplitSizes(calibration=2048, validation=200, test=400)


def zoo_of(said: str, folder: Path) -> Zoo:
    """Return a zoo as the command line names it: `text`, `vision`, or `NAME=RECIPE`.

    The project's own is fetched and its experts are trained, unless they lie in the folder already.

    Raises:
        RecipeError: there is no such zoo.
    """
    name, given, recipe = said.partition("=")
    place = (folder / name).resolve()
    if given:
        return Zoo(name, Path(recipe).resolve(), place)
    if name not in ZOOS:
        raise RecipeError(f"there is no zoo '{name}'; choose one of {', '.join(ZOOS)}, or say NAME=RECIPE")
    return Zoo(name, prepare(place, zoo=name, sizes=SIZES), place)
