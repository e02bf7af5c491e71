"""The MLflow record of a merge: a parent run, a child for each trial, made from what the store keeps of the merge.

Logged after the fact and found again by the model's digest, so that a repeated merge adds nothing. What could not be
logged because nobody answered is `tasks.unsent`'s.
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from bmm.disk import explained
from bmm.errors import ArtefactDamagedError, BMMError
from bmm.pipeline import Merge
from bmm.progress import progress
from bmm.publication import told
from bmm.report.findings import opening
from bmm.runs import Run
from bmm.store import Artefact, Store
from tasks import unsent
from tasks.addresses import without_credentials

_CHILD_OF = "mlflow.parentRunId"
MODEL_TAG = "bmm.model_digest"
_RECIPE_TAG = "bmm.recipe_digest"


class TrackingError(BMMError):
    """MLflow refuses or cannot be reached; the merge itself is whole."""


@dataclass(frozen=True)
class Tracked:
    """Where MLflow keeps a merge; `uri` has no credentials in it."""

    run_id: str
    experiment: str
    uri: str


@dataclass(frozen=True)
class Outcome:
    """A finished merge and where it was logged; `tracking_error` says why it was not.

    `sent_later` are records of earlier merges that could be logged only now.
    """

    merge: Merge
    tracked: Tracked | None
    tracking_error: str | None = None
    sent_later: int = 0


def track_or_explain(
    store: Store, merge: Merge, *, enabled: bool, log: Callable[[Store, Merge], Tracked] | None = None
) -> Outcome:
    """Log a merge, and those that wait to be logged; a tracker that fails costs nothing, and its record waits too."""
    if not enabled:
        return Outcome(merge, None)
    uri = without_credentials(tracking_uri(store))
    try:
        kept = unsent.put(store, merge.record, uri) if merge.record else None
        tracked = (log or track)(store, merge)
        if kept is not None:
            unsent.remove(store, kept)
    except Exception as error:
        return Outcome(merge, None, reason_of(error))
    try:
        return Outcome(merge, tracked, sent_later=unsent.send(store, uri, track_run))
    except BMMError as error:
        # This merge's own record is there.
        return Outcome(merge, tracked, f"records of earlier merges still wait: {reason_of(error)}")


def tracking_uri(store: Store) -> str:
    """Return `MLFLOW_TRACKING_URI`, else a sqlite file inside the store."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{store.root / 'mlflow' / 'mlflow.db'}"


def quiet_mlflow() -> None:
    """Set what MLflow shall be like where nobody has; call it before anything asks it for something."""
    # A server that does not answer must not hold up a night's work for the hours of MLflow's own default.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # Standard output holds results only, and the address may have a password in it.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    # Nor does the terminal need a second bar.
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # A new sqlite file is no news to somebody who waits for a merge.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)


def track(store: Store, merge: Merge) -> Tracked:
    """Log a finished merge to MLflow, unless it is logged already.

    Raises:
        TrackingError: the tracking server refuses or cannot be reached.
    """
    return track_run(store, Run(merge.document, merge.results["publish"].reference("model")))


def track_run(store: Store, run: Run) -> Tracked:
    """Log a merge to MLflow, unless it is logged already; all that is needed comes from the store.

    Raises:
        ArtefactDamagedError: the store has lost the model.
        TrackingError: the tracking server refuses or cannot be reached.
    """
    try:
        # Two runs of one recipe end at the same moment: the second must not take the first's record for a dead one.
        with store.locked("tracking", run.model.digest):
            return _track(store, run)
    except ArtefactDamagedError:
        raise
    except Exception as error:
        # MLflow's errors quote the whole URI; nothing that follows (a log, a state, a traceback) may show a password.
        raise TrackingError(reason_of(error)) from None


def _track(store: Store, run: Run) -> Tracked:
    quiet_mlflow()
    from mlflow import MlflowClient

    document = run.document
    uri = tracking_uri(store)
    local = uri.startswith("sqlite:")
    if local:
        with explained(store.root):
            (store.root / "mlflow").mkdir(parents=True, exist_ok=True)
    client = MlflowClient(uri)
    name = document["recipe"]["tracking"]["experiment"]
    experiment = _experiment(client, name, (store.root / "mlflow" / "artifacts").as_uri() if local else None)
    tags = {MODEL_TAG: run.model.digest, _RECIPE_TAG: document["recipe_digest"]}
    query = " and ".join(f"tags.`{tag}` = '{value}'" for tag, value in tags.items())
    for found in client.search_runs([experiment], query):
        if found.info.status == "FINISHED":
            return Tracked(found.info.run_id, name, without_credentials(uri))
        # A run that was killed while it was being written: its successor tells the whole story.
        for child in client.search_runs([experiment], f"tags.`{_CHILD_OF}` = '{found.info.run_id}'"):
            client.delete_run(child.info.run_id)
        client.delete_run(found.info.run_id)
    run_id = _log(client, experiment, document, store.read(run.model), tags)
    return Tracked(run_id, name, without_credentials(uri))


def reason_of(error: Exception) -> str:
    """Return the first line of an error's message, free of credentials."""
    message = str(error).strip() or type(error).__name__
    return without_credentials(message.splitlines()[0])[:300]


def _experiment(client: Any, name: str, artifacts: str | None) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        # Another merge may make it at the same moment; then it is there, and the error says nothing of interest.
        with suppress(MlflowException):
            return str(client.create_experiment(name, artifact_location=artifacts))
        found = client.get_experiment_by_name(name)
    return str(found.experiment_id)


def _log(client: Any, experiment: str, document: Mapping[str, Any], model: Artefact, tags: Mapping[str, str]) -> str:
    from mlflow.entities import Metric, Param, RunTag
    from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE

    now = int(time.time() * 1000)
    trials = document["search"]["trials"]
    lineage = {f"bmm.expert.{expert['name']}": expert["digest"] for expert in document["experts"]}
    parent = client.create_run(
        experiment,
        run_name=Path(document["recipe"]["output"]).name or "merge",
        tags={**tags, "bmm.base": document["base"]["digest"], MLFLOW_RUN_NOTE: opening(document), **lineage},
    ).info.run_id
    metrics = [Metric(name, value, now, 0) for name, value in _metrics(document).items()]
    metrics += [
        Metric("search.objective", trial["objective"], now, trial["index"])
        for trial in trials
        if trial["objective"] is not None
    ]
    # By place as well as by name, so that runs over different groups can be set beside each other.
    metrics += [
        Metric(_plain(f"search.importance.{entry['name']}"), entry["share"], now, place)
        for place, entry in enumerate(document["search"].get("importance", ()))
    ]
    parameters = [Param(name, str(value)[:500]) for name, value in sorted(_flat(_settings(document)).items())]
    client.log_batch(parent, metrics=metrics, params=parameters)
    split = document["search"].get("split") or "validation"
    with progress("logging to MLflow", len(trials) + 1) as bar:
        for trial in trials:
            child = client.create_run(
                experiment, run_name=f"trial {trial['index']}", tags={_CHILD_OF: parent}
            ).info.run_id
            # Without labels a task's value is how often the model agrees with the expert.
            measured = {f"{split}.{task}": value for task, value in trial["tasks"].items()}
            if trial["objective"] is not None:
                measured |= {"objective": trial["objective"], "seen": trial["seen"]}
            if trial["variance"] is not None:
                measured["objective.standard_error"] = math.sqrt(trial["variance"])
            chosen = {
                f"{what}.{group}": "inf" if value is None else value
                for group, setting in trial["settings"].items()
                for what, value in _flat(setting).items()
            }
            client.log_batch(
                child,
                metrics=[Metric(name, value, now, trial["index"]) for name, value in measured.items()],
                params=[Param(_plain(name), str(value)) for name, value in chosen.items()],
                tags=[RunTag("bmm.origin", trial["origin"]), RunTag("bmm.state", trial["state"])],
            )
            client.set_terminated(child, "FAILED" if trial["state"] == "failed" else "FINISHED")
            bar.advance()
        _log_artifacts(client, parent, document, model)
        bar.advance()
    client.set_terminated(parent, "FINISHED")
    return str(parent)


def _log_artifacts(client: Any, run_id: str, document: Mapping[str, Any], model: Artefact) -> None:
    # What draws takes long to import, and most nights have nothing to draw.
    from bmm.report.figures import pngs

    with tempfile.TemporaryDirectory(prefix="bmm-mlflow-") as folder:
        for name, drawn in pngs(document).items():
            (Path(folder) / f"{name}.png").write_bytes(drawn)
        client.log_artifacts(run_id, folder, "figures")
    client.log_text(run_id, yaml.safe_dump(document["recipe"], sort_keys=False, allow_unicode=True), "recipe.yaml")
    lineage = {key: document[key] for key in ("recipe_digest", "base", "experts", "anchor", "data", "environment")}
    client.log_dict(run_id, lineage, "lineage.json")
    texts = told(document)
    for name in ("merge.json", "report.html"):
        client.log_text(run_id, texts[name], name)
    # The output folder as it was written; by now a later merge may have replaced it.
    for name, text in texts.items():
        client.log_text(run_id, text, f"model/{name}")
    for name in model.manifest["files"]:
        client.log_artifact(run_id, str(model.file(name)), str(PurePosixPath("model", name).parent))


def _metrics(document: Mapping[str, Any]) -> dict[str, float]:
    found = {}
    for split, tasks in document["metrics"].items():
        for task, entry in tasks.items():
            for role in ("base", "expert", "anchor", "merged"):
                found[_plain(f"{split}.{task}.{role}")] = entry[role]
        for role, value in tasks["mean"]["share_of_experts"].items():
            found[f"{split}.share_of_experts.{role}"] = value
    return found


def _settings(document: Mapping[str, Any]) -> dict[str, Any]:
    recipe = document["recipe"]
    parts = ("base_model", "anchor", "grams", "regression", "search", "dtype", "output")
    return {**{part: recipe[part] for part in parts}, "experts": [expert["name"] for expert in document["experts"]]}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    return {
        name: leaf
        for key, part in value.items()
        for name, leaf in _flat(part, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def _plain(name: str) -> str:
    # MLflow's names allow no other characters.
    return "".join(letter if letter.isalnum() or letter in "_-./ " else "_" for letter in name)
