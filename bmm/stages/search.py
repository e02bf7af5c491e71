"""Stage 5, search: the posterior's hyperparameters, chosen on the validation rows, or without a search where told.

Puts together the assembly of weights, the panel of tasks and the durable study; the chosen weights are written here,
in the dtype in which they will be published, so that what is tested later is what was found.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from bmm.assembly import Assembler, Solved
from bmm.errors import CheckpointError
from bmm.evaluation.metrics import mean_ratio_to_expert
from bmm.grams.store import GramReader
from bmm.prediction import StoredWeights
from bmm.problems import module_wise, propagated
from bmm.progress import progress
from bmm.regression.settings import RegressionSettings
from bmm.search.run import Outcome, search
from bmm.search.settings import Per, SearchSettings
from bmm.search.space import ModulePlace, Setting, Space, groups_of
from bmm.search.study import Study
from bmm.stages.anchor import published_dtypes, write_state
from bmm.stages.panel import expert_predictions, panel_of
from bmm.stages.propagation import walk
from bmm.stages.request import Request, Work, version_of
from bmm.stages.setup import Setup, setup_of
from bmm.stages.strength import check_groups, described, settings_without_search
from bmm.store import Draft
from bmm.weights import ExpertWeights

DTYPES = {"base": None, "float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""The recipe's words for a dtype, in safetensors' words; None is each parameter's own dtype in the base."""
ANCHOR = Setting(math.inf, 1.0)
"""Where a map keeps its anchor, bit for bit."""


def run_search(work: Work, request: Request) -> dict[str, Any]:
    """Choose `λ` and `γ` per module group, by a search or as the recipe says, and write that model's encoder.

    Raises:
        CheckpointError: fewer of the weights can be regressed than the recipe demands.
        RecipeError: the recipe's strengths are of other module groups.
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
    dtype = DTYPES[request.settings["dtype"]]
    dtypes = published_dtypes(setup, dtype)
    with setup.weights() as weights:
        if settings.trials:
            rest = {name: anchored(name).to(dtypes[name]) for name in weights.names()}
            # The experts are looked at first: a task that none can do is told before the long part.
            objective = _Objective(work, request, setup, groups, rest, dtypes)
            assembler = assembler_of(work, request, setup, weights, anchored)
            chosen, told = _searched(request, settings, draft, objective, assembler)
        else:
            assembler = assembler_of(work, request, setup, weights, anchored, keep=False)
            chosen = settings_without_search(
                strength, groups, assembler.evidence, assembler.walked, settings.log10_lambda
            )
            told = _without_search(settings, strength, chosen)
        rounds = request.settings["regression"].get("rounds", 1)
        treatments = anchor.read_json("treatments.json")
        _write_best(draft, setup, assembler, weights, treatments, groups, chosen, anchored, dtype, rounds)
        draft.write_json("search.json", told)


class _Objective:
    """What a setting is worth: the merged model's scores on the validation rows beside the experts'."""

    def __init__(
        self,
        work: Work,
        request: Request,
        setup: Setup,
        groups: Mapping[str, str],
        rest: Mapping[str, torch.Tensor],
        dtypes: Mapping[str, torch.dtype],
    ) -> None:
        self.groups = groups
        self._panel = panel_of(work, request, setup)
        self._rest, self._dtypes = rest, dtypes
        answers = expert_predictions(setup, self._panel, "validation")
        self.expert = {expert: measured.score for expert, measured in answers.items()}
        # Of a model about as good as the experts, on as many rows.
        shares = [measured.variance / measured.score**2 for measured in answers.values() if measured.score]
        self.noise = sum(shares) / len(answers) ** 2

    def evaluate(self, assembler: Assembler, chosen: Mapping[str, Setting]) -> Outcome:
        """Run the model of one setting."""
        regressed = assembler.trial({module: chosen[group] for module, group in self.groups.items()})
        state = {**self._rest, **{name: tensor.to(self._dtypes[name]) for name, tensor in regressed.items()}}
        found = {task: measured.score for task, measured in self._panel.evaluate(state, "validation").items()}
        return Outcome(mean_ratio_to_expert(found, self.expert), found)


def _searched(
    request: Request, settings: SearchSettings, draft: Draft, objective: _Objective, assembler: Assembler
) -> tuple[Mapping[str, Setting], dict[str, Any]]:
    """Search, and return the best setting of each group and what `search.json` says."""
    space = Space(tuple(dict.fromkeys(objective.groups.values())), settings.log10_lambda, settings.gamma)
    identity = {"inputs": dict(request.inputs), "settings": dict(request.settings)}
    draft.progress.mkdir(parents=True, exist_ok=True)
    study = Study.open(draft.progress / "trials.jsonl", identity)
    best = search(
        space,
        lambda chosen: objective.evaluate(assembler, chosen),
        study,
        settings.trials,
        settings.seed,
        objective.noise or None,
        _reference(request),
    )
    told = {
        "per": settings.per,
        "lambda": "search",
        "objective": settings.objective,
        "seed": settings.seed,
        "noise": objective.noise,
        "expert": dict(objective.expert),
        "trials": [trial.to_json() for trial in study.trials],
        "best": {
            "index": best.index,
            "objective": best.objective,
            "settings": {group: setting.to_json() for group, setting in best.settings.items()},
        },
    }
    return best.settings, told


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
    keeps_none = rounds > 1

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


def check_coverage(setup: Setup, minimum: float) -> None:
    """Refuse a merge that would regress too small a share of the encoder's matrix weights (embeddings apart).

    Raises:
        CheckpointError: naming the largest matrix that would be missed.
    """
    regressed = {map_.weight for map_ in setup.regressed}
    matrices = {
        parameter.name: math.prod(parameter.shape)
        for parameter in setup.layout.shared
        if sum(size > 1 for size in parameter.shape) >= 2 and parameter.name not in setup.embeddings
    }
    reached = sum(size for name, size in matrices.items() if name in regressed)
    total = sum(matrices.values())
    if total == 0 or reached / total < minimum:
        missed = max(
            (name for name in matrices if name not in regressed), key=lambda name: matrices[name], default="none"
        )
        raise CheckpointError(
            f"only {reached} of {total} matrix weights of this architecture are linear maps that can be regressed "
            f"(largest missed: {missed}); lower coverage.minimum to merge the rest by the anchor alone"
        )


def module_groups(setup: Setup, per: Per) -> dict[str, str]:
    """Return each regressed map's module with the group that shares its hyperparameters."""
    return groups_of([ModulePlace(map_.module, map_.type, map_.layer) for map_ in setup.regressed], per)


def assembler_of(
    work: Work, request: Request, setup: Setup, weights: ExpertWeights, anchored: StoredWeights, *, keep: bool = True
) -> Assembler:
    """Return the assembler of the maps that the request of a search asks for; with `keep` every factor is held."""
    if request.settings["regression"]["mode"] == "propagated":
        walked = walk(work, request, setup, anchored)
        problems = propagated(setup.regressed, weights, walked.prior, walked.moments, keep=keep)
        return Assembler(problems, walked.prior, walked.lambdas, walked.solved)
    grams = gram_readers(work, request, setup)
    settings = RegressionSettings.model_validate(request.settings["regression"])
    counts = settings.weights([expert.name for expert in setup.experts])
    problems = module_wise(
        setup.regressed,
        weights,
        anchored,
        lambda index, group: grams[index].gram(group) * counts[index],
        lambda group: sum(reader.rows(group) for reader in grams),
        keep=keep,
    )
    return Assembler(problems, anchored)


def gram_readers(work: Work, request: Request, setup: Setup) -> list[GramReader]:
    """Return the readers of the experts' Gram matrices, in the experts' order."""
    return [GramReader(work.read(request.inputs["grams"][expert.name]).file("grams.zarr")) for expert in setup.experts]
