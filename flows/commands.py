"""What the commands do: each returns plain JSON values, and raises `BMMError` when it cannot.

How results are shown is `flows.show`; words and exit codes are `flows.cli`.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bmm.errors import UserError
from bmm.recipe import Recipe
from bmm.store import Store

if TYPE_CHECKING:
    from bmm.pipeline import Execute
    from bmm.sources import Inputs, Model


def prepare_demo(folder: Path, zoo: Literal["text", "vision"], experts: Literal["four", "all"]) -> Path:
    """Make or complete the demo's base, data and experts; return its recipe."""
    from bmm.zoo.layout import prepare

    return prepare(folder, experts, zoo=zoo)


def init(folder: Path, *, force: bool) -> dict[str, Any]:
    """Write a recipe for the experts in a folder."""
    from bmm.starter import write_recipe

    return write_recipe(folder, force=force)


def plan(path: Path, store: str | None, *, fresh: bool) -> dict[str, Any]:
    """Return the plan of a merge, or refuse it."""
    from bmm.plan import make_plan, require_fit
    from bmm.sources import fingerprint_inputs

    recipe = _recipe(path)
    made = make_plan(recipe, fingerprint_inputs(recipe), opened_store(store, fresh=fresh))
    require_fit(made, recipe)
    return made.to_json()


def plan_offline(path: Path, config: Path | None) -> dict[str, Any]:
    """Check a recipe without the network, say what that leaves open, and estimate from the base's configuration."""
    from bmm.offline import check_offline, estimate_offline, known_config

    recipe = _recipe(path)
    found: dict[str, Any] = {"recipe": str(path), **asdict(check_offline(recipe)), "estimate": None}
    known = config or known_config(recipe)
    if known is None:
        found["not_checked"] = [
            "how much memory and disk it takes, for want of the base's configuration (name it with --config)",
            *found["not_checked"],
        ]
        return found
    stages, output_bytes = estimate_offline(recipe, known)
    found["estimate"] = {
        "config": str(known),
        "stages": [asdict(stage) for stage in stages],
        "disk_bytes": sum(stage.disk_bytes for stage in stages),
        "memory_bytes": max(stage.memory_bytes for stage in stages),
        "output_bytes": output_bytes,
    }
    return found


def merge(path: Path, store: str | None, *, fresh: bool, server: bool) -> dict[str, Any]:
    """Run a merge, as a Prefect flow or in this process, and log it to MLflow."""
    from bmm.plan import make_plan, require_fit
    from bmm.sources import fingerprint_inputs

    started = time.perf_counter()
    recipe = _recipe(path)
    opened = opened_store(store, fresh=fresh)
    # Everything that can be refused without work is refused here, before a server or a worker starts.
    require_fit(make_plan(recipe, fingerprint_inputs(recipe), opened), recipe)
    outcome = _merge_with_prefect(recipe, opened) if server else _merge_here(recipe, opened)
    merged, tracked = outcome.merge, outcome.tracked
    return {
        "output": str(merged.output),
        "report": str(merged.output / "report.html"),
        "store": opened.location,
        "seconds": time.perf_counter() - started,
        "share_of_experts": merged.document["metrics"].get("test", {}).get("mean", {}).get("share_of_experts"),
        "stages": merged.document["stages"],
        "mlflow": asdict(tracked) if tracked else None,
        "mlflow_error": outcome.tracking_error,
        "mlflow_sent_later": outcome.sent_later,
    }


def _merge_with_prefect(recipe: Recipe, store: Store) -> Any:
    from flows.connecting import with_prefect

    def run() -> Any:
        from flows.merge import merge_flow

        return merge_flow(recipe.document(), str(recipe.folder), store.location, store.fresh)

    return with_prefect(run)


def _merge_here(recipe: Recipe, store: Store) -> Any:
    from bmm.pipeline import perform_here, run
    from tasks.tracking import track_or_explain

    merged = run(recipe, store, perform_here)
    return track_or_explain(store, merged, enabled=recipe.tracking.enabled)


def grams(
    path: Path, store: str | None, *, fresh: bool, output: Path | None = None, execute: Execute | None = None
) -> dict[str, Any]:
    """Run the stages up to the Gram matrices, and publish them in a folder for each expert below `output`."""
    from bmm.grams.published import check_target, publish
    from bmm.grams.settings import sample_in
    from bmm.grams.store import GramReader
    from bmm.pipeline import perform_here, run_stages
    from bmm.sources import fingerprint_inputs
    from bmm.stores.at_work import at_work

    recipe = _recipe(path)
    if output is not None:
        for name in (expert.name for expert in recipe.experts):
            check_target(output / name)
    opened = opened_store(store, fresh=fresh)
    stages = ("experts", "task-vectors", "grams")
    with at_work(opened):
        results = run_stages(recipe, fingerprint_inputs(recipe), opened, execute or perform_here, stages, grams=True)
    experts = []
    for expert in recipe.experts:
        reference = results["grams"].reference("experts", expert.name)
        artefact = opened.read(reference)
        reader = GramReader(artefact.file("grams.zarr"))
        names = reader.names()
        if output is not None:
            publish(artefact, output / expert.name)
        experts.append(
            {
                "expert": expert.name,
                "key": reference.key,
                "digest": reference.digest,
                "path": str(artefact.file("grams.zarr")),
                "matrices": len(names),
                "rows": max(reader.rows(name) for name in names),
                "bytes": sum(entry["bytes"] for entry in artefact.manifest["files"].values()),
                "shards": artefact.provenance.get("shards"),
            }
        )
    return {
        "state": results["grams"].state,
        "seconds": results["grams"].seconds,
        "source": recipe.grams.source,
        **sample_in(vars(recipe.grams)),
        "output": None if output is None else str(output.resolve()),
        "experts": experts,
    }


def evaluate(
    model: str,
    path: Path,
    split: Literal["validation", "test"],
    store: str | None,
    samples: int | None = None,
    seed: int | None = None,
) -> dict[str, Any]:
    """Evaluate a checkpoint on a recipe's tasks, with its heads or the experts'; with `samples`, its posterior too."""
    from bmm.pipeline import perform_here, run_stages
    from bmm.sources import fingerprint_inputs, fingerprint_model
    from bmm.stages.evaluate import evaluate_checkpoint
    from bmm.stages.request import Work
    from bmm.stores.at_work import at_work

    if samples is None and seed is not None:
        raise UserError("--seed is that of the drawn models; give --samples too, or leave it out")
    recipe = _recipe(path)
    inputs = fingerprint_inputs(recipe, check_output_folder=False)
    folder = Path.cwd() if os.path.exists(model) else recipe.folder
    found = fingerprint_model(model, folder, "MODEL", inputs.base)
    opened = opened_store(store)
    drawn: dict[str, Any] = {}
    if samples is not None:
        # First, since it can refuse.
        drawn["samples"] = _sampled(recipe, inputs, opened, found, split, samples, seed)
        drawn["samples"]["figure"] = str(_draw_reliability(drawn["samples"], split, Path(found.path)))
    with at_work(opened):
        results = run_stages(recipe, inputs, opened, perform_here, ("experts",))
        return {**evaluate_checkpoint(Work(opened), recipe, inputs, results, found, split), **drawn}


def _sampled(
    recipe: Recipe, inputs: Inputs, store: Store, model: Model, split: str, count: int, seed: int | None
) -> dict[str, Any]:
    """Evaluate draws from the posterior of the recipe's finished merge, whose output the model must be."""
    from bmm.plan import cached_results
    from bmm.requests import Requests
    from bmm.stages.request import Work, recorded
    from bmm.stages.sample import evaluate_samples, require_output, require_regression

    require_regression(recipe.regression.mode)
    work, requests = Work(store), Requests(recipe, inputs)
    results = cached_results(recipe, inputs, store)
    # The model does not depend on what it was compared with, so that may have changed since.
    published = recorded(store, requests.build("publish", results)) if "search" in results else None
    require_output(work, model, published)
    return evaluate_samples(
        work,
        requests.build("search", results),
        requests.build("evaluate", results),
        results["search"].reference("search"),
        recipe.evaluation,
        split,
        count,
        recipe.search.seed if seed is None else seed,
    )


def _draw_reliability(samples: dict[str, Any], split: str, folder: Path) -> Path:
    """Draw the reliability diagram into the merge's output folder, and return where it is."""
    from bmm.disk import explained
    from bmm.report.reliability import reliability_png

    path = folder / f"reliability-{split}.png"
    with explained(path):
        path.write_bytes(reliability_png(samples, split))
    return path


def report(run: Path, store: str | None) -> dict[str, Any]:
    """Rebuild the report of an output folder, or of a recipe whose stages are all finished."""
    from bmm.publication import export, read_document, rewrite_report

    if run.is_dir():
        rewrite_report(run, read_document(run))
        return {"output": str(run), "report": str(run / "report.html")}
    from bmm.document import build_document
    from bmm.pipeline import stages_of
    from bmm.plan import cached_results
    from bmm.sources import fingerprint_inputs
    from bmm.stages.request import Work

    recipe = _recipe(run)
    inputs = fingerprint_inputs(recipe)
    opened = opened_store(store)
    results = cached_results(recipe, inputs, opened)
    missing = [stage for stage in stages_of(recipe) if stage not in results]
    if missing:
        raise UserError(f"{run} has not been merged yet (first missing stage: {missing[0]}); run `bmm merge {run}`")
    work = Work(opened)
    output = recipe.resolve(recipe.output)
    export(work.read(results["publish"].reference("model")), build_document(recipe, inputs, results, work), output)
    return {"output": str(output), "report": str(output / "report.html")}


def track(store: str | None, *, any_tracker: bool) -> dict[str, Any]:
    """Log to MLflow the merges that could not be logged when they ended."""
    from tasks import unsent
    from tasks.addresses import without_credentials
    from tasks.tracking import TrackingError, track_run, tracking_uri

    opened = opened_store(store)
    uri = without_credentials(tracking_uri(opened))
    found: dict[str, Any] = {"store": opened.location, "tracker": uri, "error": None}
    before = unsent.waiting(opened)
    try:
        unsent.send(opened, None if any_tracker else uri, track_run)
    except TrackingError as error:
        found["error"] = str(error)
    left = unsent.waiting(opened)
    keys = {one.key for one in left}
    found["sent"] = [one.run.key for one in before if one.key not in keys]
    found["waiting"] = [{"run": one.run.key, "tracker": one.uri, "since": one.since} for one in left]
    return found


def opened_store(store: str | None, *, fresh: bool = False) -> Store:
    """Open the store, and make sure that it answers.

    Raises:
        OutputError: it cannot be used.
    """
    opened = Store.open(store, fresh=fresh)
    opened.check()
    return opened


def _recipe(path: Path) -> Recipe:
    from tasks.models import register

    register()
    return Recipe.from_yaml(path)
