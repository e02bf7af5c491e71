"""The MLflow registry's view of a model that is merged every night: versions, and which of them is the champion.

`champion` is the version in use, `previous` the one that it replaced, `challenger` the last one that did not become it,
with the reason as a tag. A move is written down whole before it is begun (a tag of the registered model), and the one
step that makes it true is the move of the alias `champion`; so a reader never sees a wrong champion, and whoever comes
next finishes what a killed one has begun. Versions are known by the digest of the model, so none is registered twice.

What is known of versions and moves is in `tasks.registered`; who is asked to move what is decided elsewhere
(`flows.night`, `flows.standing`).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bmm.checkpoint.folder import replacing
from bmm.errors import BMMError, UserError
from bmm.nightly.tasks import tasks_of
from bmm.pipeline import Merge
from bmm.store import Store
from tasks.addresses import without_credentials
from tasks.registered import DIGEST, PROMOTED_NIGHT, REPLACED, TASKS, Move, Standing, Version
from tasks.tracking import Tracked, quiet_mlflow, tracking_uri

_INTENT, _NIGHT = "bmm.intent", "bmm.night"
# MLflow's own limit for the tags of a registered model.
_LONGEST = 4500


class RegistryError(BMMError):
    """The MLflow registry refuses or cannot be reached; nothing was promoted that was not on its way already."""


Place = Callable[[Version], None]
"""Puts a version's files where people read the champion."""


class Champions:
    """The versions of one registered model.

    Args:
        store: whose registry is meant where none is configured.
        model: the registered model's name.
    """

    def __init__(self, store: Store, model: str) -> None:
        quiet_mlflow()
        from mlflow import MlflowClient

        self.model = model
        self._tracking = tracking_uri(store)
        self._registry = os.environ.get("MLFLOW_REGISTRY_URI") or self._tracking
        if self._tracking.startswith("sqlite:"):
            (store.root / "mlflow").mkdir(parents=True, exist_ok=True)
        with self._answering():
            self._client: Any = MlflowClient(self._tracking, registry_uri=self._registry)

    @property
    def address(self) -> str:
        """Where the registry is, as it may be shown."""
        return without_credentials(self._registry)

    # -- looking ---------------------------------------------------------------------------------------------

    def standing(self) -> Standing:
        """Return where the aliases point now."""
        with self._answering():
            found = self._registered()
            if found is None:
                return Standing(None, None, None, None, None)
            # Aliases come with the registered model, so all three are of one moment.
            at = {alias: self._version(str(number)) for alias, number in found.aliases.items()}
            begun = found.tags.get(_INTENT)
            move = Move(**json.loads(begun)) if begun else None
            champion, previous, challenger = (at.get(name) for name in ("champion", "previous", "challenger"))
            return Standing(champion, previous, challenger, found.tags.get(_NIGHT), move)

    def version(self, number: str) -> Version:
        """Return a version by its number.

        Raises:
            UserError: there is none.
        """
        with self._answering():
            if not any(str(one.version) == number for one in self._all()):
                raise UserError(f"the registered model {self.model} has no version {number}; name one that it has")
            return self._version(number)

    # -- versions --------------------------------------------------------------------------------------------

    def register(self, merge: Merge, tracked: Tracked) -> Version:
        """Register a merge that MLflow has on record; a model that is registered already keeps its version."""
        digest = merge.results["publish"].reference("model").digest
        with self._answering():
            if self._registered() is None:
                self._create()
            for one in self._all():
                if one.tags.get(DIGEST) == digest:
                    return self._version(str(one.version))
            run = self._client.get_run(tracked.run_id)
            tags = {
                DIGEST: digest,
                TASKS: json.dumps(tasks_of(merge.document), sort_keys=True),
                "bmm.recipe_digest": merge.document["recipe_digest"],
                "bmm.share_of_experts": f"{merge.share_of_experts or 0:.4f}",
            }
            made = self._client.create_model_version(
                self.model, f"{run.info.artifact_uri}/model", run_id=tracked.run_id, tags=tags
            )
            return self._version(str(made.version))

    def fetch(self, version: Version, folder: Path) -> None:
        """Bring a version's files into an empty folder."""
        import mlflow

        with self._answering():
            brought = mlflow.artifacts.download_artifacts(
                artifact_uri=version.source, dst_path=str(folder), tracking_uri=self._tracking
            )
        if Path(brought) != folder:
            for file in list(Path(brought).iterdir()):
                file.rename(folder / file.name)
            Path(brought).rmdir()

    def put(self, version: Version, output: Path) -> None:
        """Make a folder hold a version, as a whole or not at all.

        Its files are copies even on the store's own disk, where a merge's output has links (`bmm.publication`): the
        store checks what it reads, but nobody checks the registry's files before a roll back; and the last night's
        candidate, which has links into the store, must not be able to change the champion.

        Raises:
            OutputError: the folder cannot be written, or is somebody else's.
        """
        with replacing(output) as folder:
            self.fetch(version, folder)

    # -- moving ----------------------------------------------------------------------------------------------

    def promote(self, version: Version, who: str, why: str, place: Place, night: str = "") -> None:
        """Make a version the champion, and the champion `previous`; who and why are on record, and which night."""
        self.finish(place)
        champion = self.standing().champion
        if champion is not None and champion.number == version.number:
            return
        origin = None if champion is None else champion.number
        self._begin(Move(version.number, origin, origin, False, who, why, time.time(), night), place)

    def roll_back(self, who: str, why: str, place: Place) -> tuple[Version, Version]:
        """Make the version that the champion replaced the champion again; return it and the one that it replaces.

        Raises:
            UserError: there is nothing to go back to.
        """
        self.finish(place)
        standing = self.standing()
        if standing.champion is None:
            raise UserError(f"the registered model {self.model} has no champion yet; there is nothing to roll back")
        if standing.previous is None:
            raise UserError(
                f"version {standing.champion.number} of {self.model} replaced no other, so there is nothing to go back "
                "to; `bmm promote` takes any version"
            )
        to, origin = standing.previous, standing.champion
        self._begin(Move(to.number, origin.number, to.replaced, True, who, why, time.time()), place)
        return to, origin

    def keep_challenger(self, version: Version, reason: str) -> None:
        """Keep a version as the challenger, with the reason why it is no more than that."""
        with self._answering():
            self._client.set_model_version_tag(self.model, version.number, "bmm.reason", reason[:_LONGEST])
            self._client.set_registered_model_alias(self.model, "challenger", version.number)

    def finish(self, place: Place) -> None:
        """End a move that somebody has begun and not ended."""
        move = self.standing().move
        if move is not None:
            self._carry_out(move, place)

    def note_night(self, signature: str) -> None:
        """Write down what the last night was about; written last, when everything else of it is done."""
        with self._answering():
            if self._registered() is None:
                self._create()
            self._client.set_registered_model_tag(self.model, _NIGHT, signature)

    def _begin(self, move: Move, place: Place) -> None:
        with self._answering():
            self._client.set_registered_model_tag(self.model, _INTENT, move.text())
        self._carry_out(move, place)

    def _carry_out(self, move: Move, place: Place) -> None:
        """Do what is left of a move; every step may be done twice."""
        champion = self.standing().champion
        now = None if champion is None else champion.number
        with self._answering():
            # Somebody has moved the alias by other means since: theirs is the last word.
            if now in (move.origin, move.to):
                self._record(move)
                self._point("previous", move.previous)
                self._point("champion", move.to)
                self._settle_challenger(move)
                place(self._version(move.to))
            self._client.delete_registered_model_tag(self.model, _INTENT)

    def _record(self, move: Move) -> None:
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(move.at))
        said = {"by": move.who[:200], "why": move.why[:2000], "at": at}
        if move.back and move.origin is not None:
            for name, value in said.items():
                self._client.set_model_version_tag(self.model, move.origin, f"bmm.rolled_back_{name}", value)
        else:
            for name, value in said.items():
                self._client.set_model_version_tag(self.model, move.to, f"bmm.promoted_{name}", value)
            self._client.set_model_version_tag(self.model, move.to, REPLACED, move.origin or "")
            self._client.set_model_version_tag(self.model, move.to, PROMOTED_NIGHT, move.night)
            self._client.set_model_version_tag(self.model, move.to, "bmm.rolled_back_by", "")

    def _settle_challenger(self, move: Move) -> None:
        if move.back and move.origin is not None:
            reason = f"rolled back by {move.who}: {move.why}"
            self._client.set_model_version_tag(self.model, move.origin, "bmm.reason", reason[:_LONGEST])
            self._point("challenger", move.origin)
        elif str(self._registered().aliases.get("challenger")) == move.to:
            self._point("challenger", None)

    def _point(self, alias: str, number: str | None) -> None:
        if number is not None:
            self._client.set_registered_model_alias(self.model, alias, number)
        elif alias in self._registered().aliases:
            self._client.delete_registered_model_alias(self.model, alias)

    # -- asking ----------------------------------------------------------------------------------------------

    def _registered(self) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            return self._client.get_registered_model(self.model)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise

    def _create(self) -> None:
        from mlflow.exceptions import MlflowException

        # Another run may make it at the same moment.
        with suppress(MlflowException):
            self._client.create_registered_model(self.model, description="Merged every night; see `champion`.")

    def _all(self) -> list[Any]:
        if self._registered() is None:
            return []
        found, token = [], None
        while True:
            page = self._client.search_model_versions(f"name = '{self.model}'", page_token=token)
            found += page
            token = page.token
            if not token:
                return found

    def _version(self, number: str) -> Version:
        found = self._client.get_model_version(self.model, number)
        tags = dict(found.tags)
        tasks = json.loads(tags.get(TASKS) or "{}")
        return Version(str(found.version), tags.get(DIGEST, ""), found.source, found.run_id or "", tasks, tags)

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """Say in one sentence, without credentials, what the registry's client says at length."""
        try:
            yield
        except BMMError:
            raise
        except OSError as error:
            if not hasattr(error, "request"):
                # This machine's disk.
                raise
            raise self._unanswered(error) from None
        except Exception as error:
            raise self._unanswered(error) from None

    def _unanswered(self, error: Exception) -> RegistryError:
        said = (str(error).strip() or type(error).__name__).splitlines()[0].replace(self._registry, "the registry")
        return RegistryError(f"the MLflow registry {self.address} refuses or cannot be reached: {said[:300]}")
