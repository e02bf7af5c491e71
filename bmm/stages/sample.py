"""Models drawn from the posterior of a finished merge, and how far their averaged answers can be believed.

No stage of a merge: what `bmm eval --samples` does with one. The posterior is that of the search's best trial, around
the published model. The noise and every drawn model's answers are artefacts, so that asking again costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from bmm.assembly import Assembler
from bmm.digest import digest_json
from bmm.errors import RecipeError, UserError
from bmm.evaluation.calibration import (
    BINS,
    Array,
    compare,
    fit_temperature,
    log_softmax,
    pooled,
    reliability,
    row_terms,
    tempered,
)
from bmm.evaluation.metrics import resampled_counts
from bmm.prediction import Panel, StoredWeights
from bmm.problems import AS_IT_IS
from bmm.publication import holds
from bmm.recipe import EvaluationSettings
from bmm.sampling import Noise, Sampler, module_wise_noise, propagated_noise
from bmm.search.setting import Setting
from bmm.sources import Model
from bmm.stages.anchor import published_dtypes
from bmm.stages.assembling import assembler_of, gram_readers, module_groups, summed_grams
from bmm.stages.heads import heads_in
from bmm.stages.objective import DTYPES
from bmm.stages.panel import panel_of
from bmm.stages.propagation import walk
from bmm.stages.request import Request, Result, Work
from bmm.stages.setup import setup_of
from bmm.store import Draft, Reference

NOISE_VERSION = 1
DRAW_VERSION = 1
MEAN, SAMPLED = "posterior_mean", "sampled"

Answers = Mapping[str, Array]
"""Task -> log-probabilities `(rows, classes)`."""


def require_regression(mode: str) -> None:
    """Refuse a merge without regression, which has no posterior.

    Raises:
        UserError: there is nothing to draw from.
    """
    if mode == "none":
        raise UserError(
            "--samples draws from the posterior of a regression, and with 'regression.mode: none' there is none; "
            "leave --samples out, or merge with another mode"
        )


def require_output(work: Work, model: Model, published: Result | None) -> None:
    """Refuse a model that is not, byte for byte, what the recipe's merge has put out.

    Raises:
        UserError: the merge is not finished, or the model is another one.
    """
    if published is None:
        raise UserError(
            "--samples draws from the posterior of a finished merge, and this store has none of this recipe; run "
            "`bmm merge` with it first"
        )
    if not holds(Path(model.path), work.read(published.reference("model"))):
        raise UserError(
            f"--samples draws from the posterior of this recipe's merge, and {model.source} is not its output; name "
            "that folder, or leave --samples out"
        )


class Draws:
    """Models drawn from the posterior of one finished search; it is built when the first one is needed.

    Args:
        work: the way to the store.
        request: that of the search.
        found: the search's artefact.
    """

    def __init__(self, work: Work, request: Request, found: Reference) -> None:
        self._work = work
        self._request = request
        self._found = found
        self._setup = setup_of(work, request)
        search = work.read(found).read_json("search.json")
        if search["trials"] and request.settings["search"]["walk"] == "every-trial":
            raise RecipeError(
                "'search.walk': this merge walked in every trial and kept no sums to draw models from; set it to once, "
                "or draw from a merge with a fixed regression.lambda"
            )
        chosen = {group: Setting.from_json(value) for group, value in search["best"]["settings"].items()}
        groups = module_groups(self._setup, search["per"])
        self._settings = {module: chosen[group] for module, group in groups.items()}

    def identity(self, seed: int, index: int) -> str:
        """Return the digest of all that the weights of draw number `index` are made from."""
        made_from = {"search": self._found.digest, "noise": self._noise_reference.digest, "seed": seed, "index": index}
        return digest_json({"draw": DRAW_VERSION, **made_from})

    def state(self, seed: int, index: int) -> dict[str, torch.Tensor]:
        """Return the encoder of draw number `index`, in the dtypes that the merge is published in."""
        drawn = self._sampler.weights(seed, index)
        return {**self.mean(), **{name: tensor.to(self._dtypes[name]) for name, tensor in drawn.items()}}

    def mean(self) -> dict[str, torch.Tensor]:
        """Return the published encoder."""
        return StoredWeights(self._work.read(self._found)).state()

    @cached_property
    def noise(self) -> dict[str, Noise]:
        """The noise of every map that is drawn, by module."""
        artefact = self._work.read(self._noise_reference)
        variances = load_file(artefact.file("noise.safetensors"))
        return {
            module: Noise(variances[module], **values) for module, values in artefact.read_json("noise.json").items()
        }

    @cached_property
    def _noise_reference(self) -> Reference:
        def make(draft: Draft) -> None:
            noise = self._measured()
            save_file({module: part.variance for module, part in noise.items()}, draft.path / "noise.safetensors")
            draft.write_json(
                "noise.json",
                {
                    module: {"rows": part.rows, "settled": part.settled, "relative": part.relative}
                    for module, part in noise.items()
                },
            )

        # Once the residuals were weighed alike, around the recipe's own sums and anchor.
        said = {"weighed": "as solved"} if self._weighed else None
        return self._work.obtain("noise", {"search": self._found.to_json()}, make, settings=said, version=NOISE_VERSION)

    @property
    def _weighed(self) -> bool:
        """Whether maps were solved with other sums or another anchor than experts that count alike give."""
        regression = self._request.settings["regression"]
        weighted = regression["mode"] == "module-wise" and any(
            weight != 1.0 for weight in regression.get("task_weights", {}).values()
        )
        return weighted or any(
            setting.sums != AS_IT_IS or setting.anchor_scale != 1.0 for setting in self._settings.values()
        )

    @cached_property
    def _sampler(self) -> Sampler:
        return Sampler(self._assembler, self._settings, self.noise)

    @cached_property
    def _dtypes(self) -> dict[str, torch.dtype]:
        return published_dtypes(self._setup, DTYPES[self._request.settings["dtype"]])

    @cached_property
    def _assembler(self) -> Assembler:
        with self._setup.weights() as weights:
            return assembler_of(self._work, self._request, self._setup, weights, self._anchored)

    def _measured(self) -> dict[str, Noise]:
        with self._setup.weights() as weights:
            if self._request.settings["regression"]["mode"] == "propagated":
                moments = walk(self._work, self._request, self._setup, self._anchored).moments
                return propagated_noise(self._assembler, self._settings, moments)
            grams = gram_readers(self._work, self._request, self._setup)
            if any(reader.provenance.get("source") == "task-vectors" for reader in grams):
                raise UserError(
                    "--samples needs to know how many rows are behind the Gram matrices, and those of this merge were "
                    "estimated from task vectors, without any; set grams.source to activations, or leave --samples out"
                )
            return module_wise_noise(
                self._assembler,
                self._settings,
                weights,
                summed_grams(self._work, self._request, self._setup),
                lambda index, group: grams[index].rows(group),
            )

    @property
    def _anchored(self) -> StoredWeights:
        return StoredWeights(self._work.read(self._request.inputs["anchor"]))


def evaluate_samples(
    work: Work,
    request: Request,
    rows: Request,
    found: Reference,
    settings: EvaluationSettings,
    split: str,
    count: int,
    seed: int,
) -> dict[str, Any]:
    """Measure the averaged probabilities of `count` draws beside the posterior mean's, before and after a temperature.

    The temperature of each is one number for all tasks, fitted on the validation rows whatever the split.

    Args:
        work: the way to the store.
        request: that of the search.
        rows: that of the evaluation, which knows the rows.
        found: the search's artefact.
        settings: of the bootstrap.
        split: the rows to report on.
        count: how many models are drawn.
        seed: of the draws.

    Returns:
        Plain JSON values: `before` and `after` the temperatures what `bmm.evaluation.calibration.compare` returns, and
        under `reliability` what that module's function of the name returns for each model.

    Raises:
        UserError: a task is not one of choosing a class for each row, or nothing is known of the posterior's width.
    """
    setup = setup_of(work, request)
    panel = panel_of(work, rows, setup).with_heads(heads_in(work.read(found).path))
    for needed in dict.fromkeys(("validation", split)):
        if not panel.has(needed):
            raise RecipeError(
                f"samples are measured on {needed} rows, and the recipe names none; add them to its tasks"
            )
    draws = Draws(work, request, found)
    known, labels = _classes(panel, "validation"), _classes(panel, split)

    def answers(on: str) -> dict[str, Answers]:
        mean = panel.logits(found.digest, draws.mean, panel.tasks, on, "posterior mean")
        members = []
        for index in range(count):
            what = f"draw {index + 1} of {count}"
            said = panel.logits(draws.identity(seed, index), partial(draws.state, seed, index), panel.tasks, on, what)
            members.append({task: log_softmax(logits) for task, logits in said.items()})
        return {
            MEAN: {task: log_softmax(logits) for task, logits in mean.items()},
            SAMPLED: {task: pooled([member[task] for member in members]) for task in panel.tasks},
        }

    validation = answers("validation")
    reported = validation if split == "validation" else answers(split)
    temperatures = {name: fit_temperature(validation[name], known) for name in (MEAN, SAMPLED)}

    def compared(scaled: Mapping[str, float]) -> dict[str, Any]:
        terms = {
            task: {
                name: row_terms(tempered(reported[name][task], scaled[name]), labels[task]) for name in (MEAN, SAMPLED)
            }
            for task in panel.tasks
        }
        return compare(terms, resampled, first=MEAN, second=SAMPLED, confidence=settings.confidence)

    def diagrams(scaled: Mapping[str, float]) -> dict[str, Any]:
        return {
            name: reliability({task: tempered(found, scaled[name]) for task, found in reported[name].items()}, labels)
            for name in (MEAN, SAMPLED)
        }

    def resampled(task: str, columns: Array) -> Array:
        pieces = resampled_counts(len(columns), task, settings.bootstrap_samples, settings.bootstrap_seed)
        return np.concatenate([counts @ columns for counts in pieces]) / len(columns)

    return {
        "count": count,
        "seed": seed,
        "bins": BINS,
        "temperature": temperatures,
        "before": compared(dict.fromkeys(temperatures, 1.0)),
        "after": compared(temperatures),
        "reliability": {"before": diagrams(dict.fromkeys(temperatures, 1.0)), "after": diagrams(temperatures)},
        "noise": {
            module: {
                "deviation": float(part.variance.mean().sqrt()),
                "rows": part.rows,
                "settled": part.settled,
                "relative": part.relative,
            }
            for module, part in draws.noise.items()
        },
    }


def _classes(panel: Panel, split: str) -> dict[str, list[int]]:
    """Return the class ids of every task's rows."""
    found = {}
    for task in panel.tasks:
        classes = panel.classes(task, split)
        if classes is None:
            raise UserError(
                f"--samples measures the probabilities of classes, and the task {task} is not one of choosing a class "
                "for each row; leave --samples out"
            )
        found[task] = classes
    return found
