"""One night, in its order: find the experts, see whether anything changed, merge, compare, promote, tell.

How a step is carried out (in this process, or as Prefect's task with retries) is left to `Hands`, so a night without a
server does the same. Every step may be done twice: what was found is kept under the run's name, what was computed is in
the store, and the registry knows what was begun; so a night that was killed is completed by one retry.
"""

from __future__ import annotations

import getpass
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from bmm.digest import digest_text
from bmm.errors import BMMError, RecipeError
from bmm.nightly.gate import Champion, Verdict, judge
from bmm.nightly.resolved import Place, Resolved, held, hold, place_of, resolve_night
from bmm.nightly.settings import OUTCOMES
from bmm.nightly.tasks import tasks_of
from bmm.nightly.vetting import broken_experts
from bmm.pipeline import Merge, perform_here, run
from bmm.progress import tell
from bmm.stages.request import Request, Result, Work
from bmm.store import Store
from bmm.stores.at_work import at_work
from tasks.champions import Champions, RegistryError
from tasks.registered import Standing, Version
from tasks.telling import tell_people
from tasks.tracking import Tracked, track, track_or_explain

Answer = TypeVar("Answer")
Found = dict[str, Any]


class Hands(Protocol):
    """How the steps of a night are carried out, and where people see what came of them."""

    @property
    def run(self) -> str | None:
        """The run's own name, under which a retry finds what its first attempt has found; None for one without."""

    @property
    def track(self) -> Callable[[Store, Merge], Tracked]:
        """Logs a merge to MLflow."""

    def execute(self, store: Store, request: Request) -> Result:
        """Execute one stage of the merge."""

    def step(self, name: str, function: Callable[[], Answer]) -> Answer:
        """Carry out a step that may touch the network."""

    def show_inputs(self, resolved: Resolved) -> None:
        """Show what the night works on."""

    def show_merge(self, merge: Merge) -> None:
        """Show what was merged."""

    def end(self, found: Found, wanted: bool) -> None:
        """Show how the night ended, and tell people if that is wanted."""


class Here:
    """Carries out a night's steps in this process, without Prefect."""

    run = None
    track = staticmethod(track)

    def step(self, name: str, function: Callable[[], Answer]) -> Answer:  # noqa: ARG002 - nobody asks for it here
        """Carry out a step, once."""
        return function()

    def execute(self, store: Store, request: Request) -> Result:
        """Execute a stage."""
        return perform_here(store, request)

    def show_inputs(self, resolved: Resolved) -> None:
        """Show nothing: there is no page."""

    def show_merge(self, merge: Merge) -> None:
        """Show nothing: there is no page."""

    def end(self, found: Found, wanted: bool) -> None:
        """Tell people."""
        if wanted and (problem := tell_people(found)):
            tell(f"nobody was told: {problem}")


def night(path: Path, store: Store, hands: Hands) -> Found:
    """Carry out one night and return what came of it, as plain JSON values.

    Args:
        path: the recipe.
        store: where artefacts are.
        hands: how steps are carried out.

    Raises:
        UserError: the recipe, or something that it names, cannot be used.
        BMMError: the night failed for another reason; the next run carries on.
    """
    started = time.time()
    wanted: tuple[str, ...] = OUTCOMES
    place: Place | None = None
    try:
        place = place_of(path)
        wanted = place.nightly.tell
        # Two nights of one model never overlap, whoever started them: the second waits here.
        with store.locked("night", digest_text(place.model)[:32]), at_work(store):
            found = _night(path, place, store, hands)
    except (BMMError, FloatingPointError, MemoryError, OSError) as error:
        failed = {
            "outcome": "failed",
            "recipe": str(path),
            "model": place.model if place else None,
            "reasons": [str(error) or type(error).__name__],
            "seconds": time.time() - started,
        }
        hands.end(failed, "failed" in wanted)
        raise
    found = {**found, "recipe": str(path), "seconds": time.time() - started}
    hands.end(found, found["outcome"] in wanted)
    return found


def _night(path: Path, place: Place, store: Store, hands: Hands) -> Found:
    resolved = hands.step("discover", lambda: _resolved(path, store, hands.run))
    hands.show_inputs(resolved)
    for name, why in resolved.left_out.items():
        tell(f"left out: {name} ({why})")
    # With every expert that was found in it, those that will turn out to be broken too: they are news only once.
    signature = resolved.signature
    if not resolved.recipe.tracking.enabled:
        raise RecipeError("'tracking.enabled': a night needs MLflow's registry; set it to true")
    if not all("test" in expert.splits() for expert in resolved.recipe.experts):
        raise RecipeError("'nightly.gate': models are compared on test rows; give test rows to every expert's task")
    champions = Champions(store, place.model)

    def put(version: Version) -> None:
        champions.put(version, place.output)

    with moving(store, place.model):
        standing = hands.step("look-up", lambda: _standing(champions, put))
    common: Found = {"model": place.model, "registry": champions.address, "output": str(place.output)}
    if standing.night == signature and not store.fresh:
        return {**common, "outcome": "unchanged", "left_out": dict(resolved.left_out), **_champion(standing)}
    broken = hands.step("vet", lambda: broken_experts(resolved, store, hands.execute))
    if broken and resolved.nightly.broken == "stop":
        said = "; ".join(f"{name} is broken ({why})" for name, why in broken.items())
        raise RecipeError(f"{said}; mend it, or let the night go on without it (nightly.broken: leave-out)")
    for name, why in broken.items():
        tell(f"left out: {name} ({why})")
    resolved = resolved.without(broken)
    candidate = resolved.recipe.model_copy(update={"output": str(place.candidate)})
    merge = run(candidate, store, hands.execute, inputs=resolved.inputs)
    hands.show_merge(merge)
    outcome = track_or_explain(store, merge, enabled=True, log=hands.track)
    tracked = outcome.tracked
    if tracked is None:
        raise RegistryError(
            f"the model is merged, but MLflow, whose registry says which model is the champion, cannot be reached "
            f"({outcome.tracking_error}); run the same again when it can"
        )
    version = hands.step("register", lambda: champions.register(merge, tracked))
    common |= {
        "left_out": dict(resolved.left_out),
        "version": version.number,
        "candidate": str(merge.output),
        "report": str(merge.output / "report.html"),
        "mlflow": asdict(tracked),
        "stages": merge.document["stages"],
        "experts": {one["name"]: one["digest"] for one in merge.document["experts"]},
    }
    champion, resumed = standing.champion, False
    if champion is not None and champion.number == version.number:
        resumed = champion.night == signature
        if not resumed:
            # Something else than the model changed, a floor say.
            hands.step("note", lambda: champions.note_night(signature))
            return {**common, "outcome": "unchanged", **_champion(standing)}
        # An earlier attempt of this very night has promoted it.
        champion = standing.previous
    verdict = hands.step("gate", lambda: _judged(resolved, store, merge, champions, champion))
    if version.rolled_back:
        # What a person has taken back, no night brings again.
        verdict = replace(verdict, reasons=(*verdict.reasons, f"it was rolled back by {version.rolled_back}"))
    if verdict.passed or resumed:
        why = "it passed the gate" if champion else "it is the first, and passed the gate"
        with moving(store, place.model):
            hands.step("promote", lambda: champions.promote(version, _who(hands), why, put, signature))
    else:
        hands.step("reject", lambda: champions.keep_challenger(version, "; ".join(verdict.reasons)))
    hands.step("note", lambda: champions.note_night(signature))
    return {
        **common,
        "outcome": "promoted" if verdict.passed or resumed else "rejected",
        "gate": verdict.to_json(),
        **_champion(hands.step("look-again", champions.standing)),
        "reasons": list(verdict.reasons),
    }


def _resolved(path: Path, store: Store, name: str | None) -> Resolved:
    """Return what this run works on: what its first attempt has found, or what there is now."""
    if name is None:
        return resolve_night(path)
    return held(store, name) or hold(store, name, resolve_night(path))


def _standing(champions: Champions, put: Callable[[Version], None]) -> Standing:
    """Return who is the champion, once a move that somebody has begun is ended."""
    champions.finish(put)
    return champions.standing()


def _champion(standing: Standing) -> Found:
    """Return the aliases as a night without a move leaves them."""
    return {
        "champion": getattr(standing.champion, "number", None),
        "previous": getattr(standing.previous, "number", None),
        "reasons": [],
    }


def _judged(resolved: Resolved, store: Store, merge: Merge, champions: Champions, champion: Version | None) -> Verdict:
    """Measure the new model and the champion on the same rows and return what the gate says."""
    from bmm.nightly.answers import Published, TestRows

    rows = TestRows(Work(store), resolved.recipe, resolved.inputs, merge.results)
    new = tasks_of(merge.document)
    digest = merge.results["publish"].reference("model").digest
    answers = rows.answers(Published("the new model", digest, lambda: merge.output), list(new))
    gate, evaluation = resolved.nightly.gate, resolved.recipe.evaluation
    if champion is None:
        return judge(answers, None, gate, evaluation)
    both = [task for task in new if champion.tasks.get(task) == new[task]]
    incomparable = {task: "its classes changed" for task in new if task in champion.tasks and task not in both}
    lost = {task: resolved.left_out[task] for task in champion.tasks if task in resolved.left_out}
    with tempfile.TemporaryDirectory(prefix="bmm-champion-") as folder:

        def fetched() -> Path:
            champions.fetch(champion, Path(folder))
            return Path(folder)

        theirs = rows.answers(Published("the champion", champion.digest, fetched), both)
    return judge(answers, Champion(champion.number, theirs, incomparable, lost), gate, evaluation)


def moving(store: Store, model: str) -> AbstractContextManager[None]:
    """Hold off everybody else who would move the champion."""
    return store.locked("champion", digest_text(model)[:32])


def _who(hands: Hands) -> str:
    return f"{user()}, by bmm nightly" + (f" (run {hands.run})" if hands.run else "")


def user() -> str:
    """Return the login name, as it goes on record."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"
