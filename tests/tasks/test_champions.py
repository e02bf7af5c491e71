"""The registry's champion, on a real registry on sqlite: moved in one step, by whoever, however often killed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bmm.errors import OutputError, UserError
from bmm.pipeline import Merge
from bmm.store import Store
from tasks.champions import Champions, RegistryError
from tasks.registered import Version
from tasks.tracking import track

MOVES = (
    "set_registered_model_tag",
    "set_model_version_tag",
    "set_registered_model_alias",
    "delete_registered_model_alias",
    "delete_registered_model_tag",
)


class KilledError(BaseException):
    """Stands for SIGKILL: nothing may catch it."""


@pytest.fixture(scope="module")
def registered(
    finished: tuple[Path, Path, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Merge, Version]:
    """A store with a registry in which a finished merge is version 1, and two others of the same files are 2 and 3."""
    place = tmp_path_factory.mktemp("registered") / "store"
    shutil.copytree(finished[1], place)
    store = Store.open(place)
    champions = Champions(store, "m")
    merge = finished[2]
    tracked = track(store, merge)
    version = champions.register(merge, tracked)
    assert champions.register(merge, tracked) == version
    for number in ("2", "3"):
        tags = {**version.tags, "bmm.model_digest": number * 64}
        champions._client.create_model_version("m", version.source, version.run_id, tags)
    return place, merge, version


@pytest.fixture
def store(registered: tuple[Path, Merge, Version], tmp_path: Path) -> Store:
    shutil.copytree(registered[0] / "mlflow", tmp_path / "store" / "mlflow")
    return Store.open(tmp_path / "store")


class Held:
    """What holds the champion for its readers."""

    def __init__(self) -> None:
        self.number: str | None = None

    def __call__(self, version: Version) -> None:
        self.number = version.number


def at(champions: Champions) -> tuple[str | None, str | None, str | None]:
    standing = champions.standing()
    numbers = [
        None if one is None else one.number for one in (standing.champion, standing.previous, standing.challenger)
    ]
    return numbers[0], numbers[1], numbers[2]


def test_a_version_is_known_by_its_model(registered: tuple[Path, Merge, Version]) -> None:
    _, merge, version = registered
    assert (version.number, version.digest) == ("1", merge.results["publish"].reference("model").digest)
    assert list(version.tasks) == ["task0", "task1", "task2"]
    assert version.tags["bmm.recipe_digest"] == merge.document["recipe_digest"]


def test_up_and_back_again(store: Store) -> None:
    champions, held = Champions(store, "m"), Held()
    assert at(champions) == (None, None, None)
    for number in "123":
        champions.promote(champions.version(number), "ann", f"reason {number}", held)
    assert (at(champions), held.number) == (("3", "2", None), "3")
    promoted = champions.version("3")
    assert (promoted.tags["bmm.promoted_by"], promoted.tags["bmm.promoted_why"]) == ("ann", "reason 3")
    assert promoted.replaced == "2"
    champions.roll_back("ben", "no good", held)
    assert (at(champions), held.number) == (("2", "1", "3"), "2")
    assert champions.version("3").rolled_back == "ben: no good"
    champions.roll_back("ben", "nor that", held)
    assert (at(champions), held.number) == (("1", None, "2"), "1")
    with pytest.raises(UserError, match="nothing to go back to"):
        champions.roll_back("ben", "further", held)
    champions.promote(champions.version("2"), "ann", "after all", held)
    assert at(champions) == ("2", "1", None)
    assert champions.version("2").rolled_back == ""
    assert champions.standing().move is None


def promote(champions: Champions, held: Held) -> None:
    champions.promote(champions.version("3"), "ann", "better", held, "a night")


def roll_back(champions: Champions, held: Held) -> None:
    champions.roll_back("ben", "worse", held)


@pytest.mark.parametrize(
    ("move", "before", "after", "stride"),
    [(promote, ("2", "1", "3"), ("3", "2", None), 1), (roll_back, ("2", "1", "3"), ("1", None, "2"), 3)],
)
def test_killed_after_any_step_one_retry_completes_it(
    move: Callable[[Champions, Held], None],
    before: tuple[str, str, str],
    after: tuple[str | None, ...],
    stride: int,
    store: Store,
) -> None:
    champions, held, steps = Champions(store, "m"), Held(), 0
    for number in "12":
        champions.promote(champions.version(number), "ann", "first", held)
    while True:
        for alias, version in zip(("champion", "previous", "challenger"), before, strict=True):
            champions._client.set_registered_model_alias("m", alias, version)
        held.number = before[0]
        if not killed(champions, move, held, steps):
            break
        # Whoever looks now sees the old champion or the new one, and a move that was begun unless it is ended.
        seen = champions.standing()
        assert seen.champion is not None
        assert seen.champion.number in (before[0], after[0])
        assert seen.move is not None or at(champions) == after
        champions.finish(held)
        assert (at(champions), held.number) == (after, after[0]), steps
        assert champions.standing().move is None
        steps += stride
    assert steps >= 8
    assert (at(champions), held.number) == (after, after[0])


def killed(champions: Champions, move: Callable[[Champions, Held], None], held: Held, step: int) -> bool:
    """Make a move and be killed after the step of that number, from 0; False if there are no more."""
    count, client = 0, champions._client

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal count
            found = function(*arguments)
            count += 1
            if count > step:
                raise KilledError
            return found

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in MOVES:
            patch.setattr(client, name, dying(getattr(client, name)))
        try:
            move(champions, held)
        except KilledError:
            return True
    return False


def test_a_champion_that_others_have_moved_meanwhile_is_theirs(store: Store) -> None:
    champions, held = Champions(store, "m"), Held()
    champions.promote(champions.version("1"), "ann", "first", held)
    assert killed(champions, promote, held, 1)
    fresh = Champions(store, "m")
    fresh._client.set_registered_model_alias("m", "champion", "2")
    fresh.finish(held)
    assert (at(fresh)[0], fresh.standing().move) == ("2", None)


def test_a_version_is_put_where_the_champion_is_read(store: Store, tmp_path: Path, registered: Any) -> None:
    champions = Champions(store, "m")
    output = tmp_path / "merged"
    output.mkdir()
    (output / "merge.json").write_text("{}")
    (output / "old").write_text("of the champion before")
    champions.put(champions.version("1"), output)
    document = json.loads((output / "merge.json").read_text())
    assert document == registered[1].document
    assert sorted(path.name for path in output.iterdir()) == sorted(
        path.name for path in registered[1].output.iterdir()
    )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("not a model")
    with pytest.raises(OutputError):
        champions.put(champions.version("1"), tmp_path / "mine")


def test_who_does_not_answer_is_named_without_a_password(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ann:secret@127.0.0.1:9")
    with pytest.raises(RegistryError, match=r"registry http://127.0.0.1:9 refuses or cannot be reached") as caught:
        Champions(store, "m").standing()
    assert "secret" not in str(caught.value)
