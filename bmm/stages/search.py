"""Stage 5, search: the posterior's hyperparameters, chosen on the validation rows, or without a search where told.

Puts together the assembly of weights, the objective and the durable study; the chosen weights are written here, in the
dtype in which they will be published, so that what is tested later is what was found.

A finished study stays in the store as an artefact of its own, known by all that its trials depend on but not by how
many there may be: a search with a larger budget carries on from it, and ends as if it had run in one go.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bmm.assembly import Assembler, Solved
from bmm.checkpoint.tensors import torch_dtype
from bmm.cluster.connection import workers
from bmm.cluster.run import run_all
from bmm.cluster.settings import ClusterSettings
from bmm.digest import digest_json
from bmm.errors import ArtefactDamagedError
from bmm.prediction import StoredWeights
from bmm.progress import progress
from bmm.search.importance import importance
from bmm.search.outcome import Evaluate, Outcome
from bmm.search.plan import Plan
from bmm.search.recommend import pareto_front
from bmm.search.rows import GainsByTask
from bmm.search.run import Found, search
from bmm.search.setting import ANCHOR, Setting
from bmm.search.settings import SearchSettings
from bmm.search.space import Space
from bmm.search.study import Study
from bmm.stages.anchor import write_state
from bmm.stages.assembling import assembler_of, check_coverage, module_groups
from bmm.stages.heads import round_heads, write_heads
from bmm.stages.objective import DTYPES, Objective
from bmm.stages.request import Request, Work, version_of
from bmm.stages.setup import Setup, setup_of
from bmm.stages.strength import check_groups, described, settings_without_search
from bmm.stages.trial_part import TrialRequest, as_outcome, forget, trial_outcome
from bmm.stages.walking import Walking
from bmm.store import Draft, artefact_key
from bmm.weights import ExpertWeights

_STUDY = "study"
_LOG = "trials.jsonl"


def run_search(work: Work, request: Request) -> dict[str, Any]:
    """Choose every module group's hyperparameters, by a search or as the recipe says, and write that model's encoder.

    Raises:
        CheckpointError: fewer of the weights can be regressed than the recipe demands.
        RecipeError: the recipe's strengths, ranges or floors are of other module groups or tasks.
    """
    setup = setup_of(work, request)
    settings = SearchSettings.model_validate(request.settings["search"])
    check_coverage(setup, request.settings["minimum_coverage"])

    def make(draft: Draft) -> None:
        _search(work, request, setup, settings, draft)

    found = work.obtain(
        "search", dict(request.inputs), make, settings=dict(request.settings), version=version_of("search")
    )
    return {"search": found.to_json()}


def _search(work: Work, request: Request, setup: Setup, settings: SearchSettings, draft: Draft) -> None:
    anchor = work.read(request.inputs["anchor"])
    anchored = StoredWeights(anchor)
    groups = module_groups(setup, settings.per)
    strength = request.settings["regression"]["lambda"]
    check_groups(strength, groups)
    with setup.weights() as weights:
        if settings.trials:
            chosen, told, assembler = _searched(work, request, setup, settings, draft, weights, groups, anchored)
        else:
            assembler = assembler_of(work, request, setup, weights, anchored, keep=False)
            chosen = settings_without_search(
                strength, groups, assembler.evidence, assembler.walked, settings.log10_lambda
            )
            told = _without_search(settings, strength, chosen)
        rounds = request.settings["regression"].get("rounds", 1)
        treatments = anchor.read_json("treatments.json")
        dtype = DTYPES[request.settings["dtype"]]
        _write_best(draft, setup, assembler, weights, treatments, groups, chosen, anchored, dtype, rounds)
        heads = request.settings["regression"].get("heads")
        if heads is not None:
            told["heads"] = {"lambda": heads, "layers": write_heads(draft, work, request, setup, heads)}
        if (half := DTYPES[request.settings.get("head_dtype", "base")]) is not None:
            round_heads(draft, work, request, setup, torch_dtype(half))
        draft.write_json("search.json", told)


def _searched(
    work: Work,
    request: Request,
    setup: Setup,
    settings: SearchSettings,
    draft: Draft,
    weights: ExpertWeights,
    groups: Mapping[str, str],
    anchored: StoredWeights,
) -> tuple[Mapping[str, Setting], dict[str, Any], Assembler]:
    """Search, and return the best setting of each group, what `search.json` says, and what assembles its weights."""
    # The experts are looked at first: a task that none can do is told before the long part.
    objective = Objective(work, request, setup, groups, anchored)
    rho = request.settings.get("rho")
    space = Space.of(settings, tuple(dict.fromkeys(groups.values())), tuple(objective.experts), rho)
    plan = Plan.of(settings, objective.experts, objective.noise, _reference(request))
    identity = _identity(request, settings)
    with ExitStack() as stack:
        walking = Walking(work, request, setup, weights, anchored) if settings.walk == "every-trial" else None
        # With trials side by side the factors are in the workers; here each map is solved once, at the end.
        keep = plan.parallel == 1 and walking is None
        assembler = assembler_of(work, request, setup, weights, anchored, keep=keep)
        evaluate: Evaluate = partial(objective.evaluate, walking or assembler)
        if plan.parallel > 1:
            evaluate = _at_workers(work, request, stack, digest_json(identity))
        found = _studied(work, draft, space, plan, identity, evaluate)
        if walking is not None and found.best.settings != space.anchor():
            assembler = walking.at({module: found.best.settings[group] for module, group in groups.items()})
    told = {
        "per": settings.per,
        "lambda": "search",
        "objective": settings.objective,
        "searcher": settings.searcher,
        "split": objective.split,
        "seed": settings.seed,
        "parallel": plan.parallel,
        "ended": found.ended,
        "noise": plan.noise,
        "expert": dict(objective.experts),
        "floors": dict(plan.floors),
        "trials": [trial.to_json() for trial in found.trials],
        "best": {
            "index": found.best.index,
            "objective": found.best.objective,
            "settings": {group: setting.to_json() for group, setting in found.best.settings.items()},
        },
        "importance": importance(space, found.trials, plan),
        "pareto": [trial.index for trial in pareto_front(found.trials, plan)],
    }
    return found.best.settings, told, assembler


def _identity(request: Request, settings: SearchSettings) -> dict[str, Any]:
    """Return what trials depend on: not on whether heads are fitted or rounded, as they answer with the experts'."""
    regression = {name: value for name, value in request.settings["regression"].items() if name != "heads"}
    said = {name: value for name, value in request.settings.items() if name not in ("head_dtype", "head_rows")}
    return {
        "inputs": dict(request.inputs),
        "settings": {**said, "regression": regression, "search": settings.identity()},
        "version": version_of("search"),
    }


def _studied(
    work: Work, draft: Draft, space: Space, plan: Plan, identity: Mapping[str, Any], evaluate: Evaluate
) -> Found:
    """Run a study, from where a killed run or a smaller budget has left it, and keep it."""
    key = artefact_key(_STUDY, version_of("search"), identity, {})
    log = draft.progress / f"{key}.jsonl"
    draft.progress.mkdir(parents=True, exist_ok=True)
    if not work.store.fresh:
        _restore(log, work)
    study = Study.open(log, identity)
    found = search(space, evaluate, study, plan)
    kept = None if work.store.fresh else work.store.find(_STUDY, key)
    if kept is None or _trials_in(work.read(kept).file(_LOG).read_bytes()) < len(study.trials):
        work.store.obtain(_STUDY, key, lambda part: _copied(log, part.path / _LOG), replace=True)
    work.uses(_STUDY, key)
    return found


def _restore(log: Path, work: Work) -> None:
    """Begin a study's log with the most that is known of it: its own, a finished study, or what a killed run left.

    A run that was killed under another budget has its log among its own progress.
    """
    known = [log.read_bytes() if log.exists() else b""]
    for left in sorted(log.parent.parent.glob(f"*/{log.name}")):
        # That run may be at its end in another process.
        with suppress(FileNotFoundError):
            known.append(left.read_bytes())
    if (kept := work.store.find(_STUDY, log.stem)) is not None:
        with suppress(ArtefactDamagedError):
            known.append(work.read(kept).file(_LOG).read_bytes())
    longest = max(known, key=_trials_in)
    if longest != known[0]:
        log.write_bytes(longest)


def _copied(log: Path, target: Path) -> None:
    shutil.copyfile(log, target)


def _trials_in(log: bytes) -> int:
    # The first line is the study's identity.
    return len(log.splitlines()) - 1


def _at_workers(work: Work, request: Request, stack: ExitStack, search_digest: str) -> Evaluate:
    """Return what has a setting measured by a worker, one that has done so before if it is free."""
    cluster = stack.enter_context(workers(ClusterSettings.model_validate(request.where["cluster"])))
    stack.callback(cluster.everywhere, forget, search_digest)

    def evaluate(chosen: Mapping[str, Setting], rival: GainsByTask | None) -> Outcome:
        asked = TrialRequest(
            search=search_digest,
            request=request.to_json(),
            store=work.store.location,
            settings={group: setting.to_json() for group, setting in chosen.items()},
            rival=None if rival is None else {task: rows.tolist() for task, rows in rival.items()},
        )
        return as_outcome(run_all(cluster, trial_outcome, [vars(asked)])[0])

    return evaluate


def _reference(request: Request) -> float | None:
    """Return the `λ` that the walk went on with, if it was one for all maps."""
    strength = request.settings["regression"].get("walk_lambda")
    return float(strength) if isinstance(strength, int | float) else None


def _without_search(settings: SearchSettings, strength: Any, chosen: Mapping[str, Setting]) -> dict[str, Any]:
    """Return what `search.json` says where nothing was searched."""
    return {
        "per": settings.per,
        "lambda": described(strength),
        "objective": None,
        "seed": None,
        "expert": {},
        "trials": [],
        "best": {
            "index": None,
            "objective": None,
            "settings": {group: setting.to_json() for group, setting in sorted(chosen.items())},
        },
    }


def _write_best(
    draft: Draft,
    setup: Setup,
    assembler: Assembler,
    weights: ExpertWeights,
    treatments: Mapping[str, str],
    groups: Mapping[str, str],
    settings: Mapping[str, Setting],
    anchored: StoredWeights,
    dtype: str | None,
    rounds: int,
) -> None:
    """Write the encoder of the chosen settings, and for every parameter how it came about."""
    entries: dict[str, dict[str, Any]] = {}
    chosen = {module: settings[group] for module, group in groups.items()}
    # From the second round on, what a map leans on is no longer the anchor.
    keeps_none = rounds > 1 and any(setting != ANCHOR for setting in chosen.values())

    def get(name: str) -> torch.Tensor:
        members = assembler.parameters.get(name, ())
        entry: dict[str, Any] = {"parameter": name, "shape": list(weights.parameter(name).shape), "module": None}
        entry |= {"treatment": treatments[name], "lambda": None, "gamma": None, "condition": None}
        if (shared_rows := weights.parameter(name).shared_rows) is not None:
            entry["shared_rows"] = shared_rows
        tensor = None
        if members:
            entry |= {"module": groups[members[0]], "treatment": "anchored"}
            if keeps_none or any(chosen[module] != ANCHOR for module in members):
                tensor, solved = assembler.parameter(name, chosen)
                entry |= _regressed(solved, chosen[members[0]])
        entries[name] = entry
        bar.advance()
        return anchored(name) if tensor is None else tensor

    with progress("writing the merged encoder", len(weights.names())) as bar:
        write_state(draft.path, setup, get, dtype=dtype)
    draft.write_json("coverage.json", [entries[name] for name in sorted(entries)])


def _regressed(solved: Mapping[str, Solved], setting: Setting) -> dict[str, Any]:
    """Return what the coverage says of a parameter and the maps in it; `setting` is the first one's."""
    conditions = [found.condition for found in solved.values() if found.condition is not None]
    entry: dict[str, Any] = {
        "treatment": "regressed",
        "gamma": setting.gamma,
        "lambda": None if math.isinf(setting.lam) else setting.lam,
        "condition": max(conditions) if len(conditions) == len(solved) else None,
    }
    if len(solved) > 1:
        # A stack of experts: those that too few tokens reached keep the anchor.
        entry["anchored_maps"] = [module for module, found in solved.items() if found.anchored]
        if len(entry["anchored_maps"]) == len(solved):
            entry["treatment"] = "anchored"
    return entry
