"""Who is the champion, and moving it by hand: `bmm promote` and `bmm rollback`, with who and why on record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bmm.errors import UserError
from bmm.nightly.resolved import place_of
from bmm.store import Store
from flows.night import moving, user
from tasks.champions import Champions
from tasks.registered import Standing, Version

Found = dict[str, Any]


def promote(path: Path, store: Store, number: str | None, who: str | None, why: str) -> Found:
    """Make a version the champion: the one that is named, else the challenger.

    Raises:
        UserError: there is no such version.
    """
    place = place_of(path)
    with moving(store, place.model):
        champions = Champions(store, place.model)

        def put(version: Version) -> None:
            champions.put(version, place.output)

        champions.finish(put)
        standing = champions.standing()
        version = champions.version(number) if number is not None else standing.challenger
        if version is None:
            raise UserError(
                f"the registered model {place.model} has no challenger; name the version to promote with --version"
            )
        champions.promote(version, who or user(), why, put)
        return _found(champions, place.model, place.output, version.number)


def roll_back(path: Path, store: Store, who: str | None, why: str) -> Found:
    """Make the version that the champion replaced the champion again.

    Raises:
        UserError: there is none.
    """
    place = place_of(path)
    with moving(store, place.model):
        champions = Champions(store, place.model)
        to, _ = champions.roll_back(who or user(), why, lambda version: champions.put(version, place.output))
        return _found(champions, place.model, place.output, to.number)


def _found(champions: Champions, model: str, output: Path, number: str) -> Found:
    standing: Standing = champions.standing()
    at = {name: getattr(getattr(standing, name), "number", None) for name in ("champion", "previous", "challenger")}
    return {"model": model, "registry": champions.address, "output": str(output), "version": number, **at}
