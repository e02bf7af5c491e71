"""What a recipe leaves open and what follows from the rest: source, mode, prior strength, trials and their objective.

Rows are optional, so the defaults depend on which there are: with all three splits a search over propagated
regression, without any a data-free merge. What was said is kept, and what does not fit together is refused. Pure
functions of the recipe's parts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bmm.grams.settings import ActivationGrams, ArtifactGrams, GramSettings, HybridGrams, TaskVectorGrams
from bmm.regression.settings import DEFAULT_LAMBDA, RegressionSettings
from bmm.search.settings import ALL_TASKS, SearchSettings

# Measured without any data, share of the experts' mean, λ = 0.01, 0.1, 1 against the evidence by type: four text tasks
# of 428 rows 98.2, 98.1, 97.4 against 98.3 (TSV-M anchor) and 97.9, 98.2, 97.9 against 97.2 (WUDI); four image tasks of
# 400 rows 93.7, 94.8, 94.3 against 94.8 (TSV-M). About ±1 each: the number is never far from the best, the evidence is
# once, since it trusts an anchor that explains the experts' weights well (WUDI's) nearly altogether.
DATA_FREE_LAMBDA = 0.1


@dataclass(frozen=True)
class Choices:
    """The parts of a recipe that depend on each other."""

    grams: GramSettings
    regression: RegressionSettings
    search: SearchSettings


def complete(
    said: Choices,
    splits: Mapping[str, Collection[str]],
    *,
    grams_said: bool,
    accuracies: bool = False,
    needs: Sequence[tuple[str, str]] = (),
) -> Choices:
    """Return the choices with everything filled in.

    Args:
        said: as the recipe has them, defaults where it says nothing.
        splits: the splits that each expert has rows for, by the expert's name.
        grams_said: whether the recipe says anything of its Gram matrices.
        accuracies: whether every task is worth the share of rows whose one class is right.
        needs: splits that other parts of the recipe cannot do without, each with the key and what it asks for.

    Raises:
        ValueError: choices that do not fit together or to the rows; the message names the key.
    """
    for split in ("validation", "test", "unlabelled"):
        with_rows = [name for name, own in splits.items() if split in own]
        without = [name for name in splits if name not in with_rows]
        if with_rows and without:
            raise ValueError(
                f"'experts': {with_rows[0]} has {split} rows and {without[0]} has none; "
                f"give {split} rows to every expert or to none"
            )
    unseen = [name for name, own in splits.items() if "calibration" not in own]
    for split, what in needs:
        lacking = next((name for name, own in splits.items() if split not in own), None)
        if lacking is not None:
            raise ValueError(
                f"{what} needs {split} rows, and {lacking} has none; add them to its task, or change this key"
            )
    said = replace(said, grams=_grams(said.grams, splits, unseen, grams_said=grams_said))
    said = replace(said, regression=_mode(said))
    _check_regression(said.regression)
    said = replace(said, regression=_heads(said, unseen))
    rows = all("validation" in own for own in splits.values())
    if said.search.objective == "agreement":
        rows = rows or all("unlabelled" in own for own in splits.values())
    said = replace(said, search=_search(said, validation=rows, accuracies=accuracies))
    _check_search(said, splits)
    return replace(said, regression=_strength(said))


def _grams(grams: GramSettings, experts: Collection[str], unseen: Sequence[str], *, grams_said: bool) -> GramSettings:
    if not grams_said and len(unseen) == len(experts):
        return TaskVectorGrams()
    if unseen and isinstance(grams, ActivationGrams | HybridGrams):
        raise ValueError(
            f"'experts': {unseen[0]} has no calibration rows, which Gram matrices from '{grams.source}' need; "
            "add them to its task, or set grams.source to task-vectors"
        )
    if isinstance(grams, ArtifactGrams):
        grams.folders(tuple(experts))
    return grams


def _mode(said: Choices) -> RegressionSettings:
    regression = said.regression
    if said.grams.source == "activations" or regression.mode == "none":
        return regression
    if "mode" not in regression.model_fields_set:
        return _changed(regression, mode="module-wise")
    if regression.mode == "propagated":
        raise ValueError(
            f"'regression.mode': propagated regression reads the calibration rows itself, so it cannot use Gram "
            f"matrices from '{said.grams.source}'; set grams.source to activations or the mode to module-wise"
        )
    return regression


def _check_regression(regression: RegressionSettings) -> None:
    """Refuse what the mode does not read; defaults pass, as a recipe that was completed before says them."""
    if regression.mode == "propagated":
        return
    walks = {"rounds": regression.rounds != 1, "walk_lambda": regression.walk_lambda != DEFAULT_LAMBDA}
    for key, said in walks.items():
        if said:
            raise ValueError(
                f"'regression.{key}': only propagated regression walks; remove it, or set regression.mode to propagated"
            )
    if regression.mode == "none" and regression.task_weights:
        raise ValueError(
            "'regression.task_weights': without regression nothing is summed; remove it, or set another regression.mode"
        )


def _heads(said: Choices, unseen: Sequence[str]) -> RegressionSettings:
    """Have heads fitted without a walk too, where every expert has calibration rows and the merge is not data-free."""
    regression = said.regression
    fits = regression.mode == "module-wise" and said.grams.source != "task-vectors" and not unseen
    return _changed(regression, heads=DEFAULT_LAMBDA) if fits and regression.heads is None else regression


def _search(said: Choices, *, validation: bool, accuracies: bool) -> SearchSettings:
    search, regression = said.search, said.regression
    trials_said = "trials" in search.model_fields_set
    strength_said = "strength" in regression.model_fields_set
    fixed = strength_said and regression.strength != "search"
    # A recipe that was completed before says the default.
    if fixed and regression.mode == "none":
        raise ValueError("'regression.lambda': without regression there is no prior; remove it, or set another mode")
    if trials_said and search.trials and not validation:
        raise ValueError(
            "'search.trials': a search needs validation rows for every expert; add them, or set search: none"
        )
    if trials_said and search.trials and fixed:
        raise ValueError(
            "'regression.lambda': this leaves nothing to search; remove search.trials, or set the key to search"
        )
    if strength_said and not fixed and regression.mode != "none":
        if not validation:
            raise ValueError(
                "'regression.lambda': a search needs validation rows for every expert; add them, or give a number"
            )
        if not search.trials:
            raise ValueError("'regression.lambda': it cannot be searched without trials; raise search.trials")
    update: dict[str, Any] = {}
    if regression.mode == "none":
        if trials_said and search.trials:
            raise ValueError(
                "'search.trials': without regression there is nothing to search; remove it, or set regression.mode"
            )
        return search.model_copy(update={"trials": 0})
    if regression.strength == "held-out":
        if regression.mode != "propagated":
            raise ValueError("'regression.lambda': held-out is for propagated regression; set the mode, or a number")
        if "per" not in search.model_fields_set:
            # Every map has chosen its own.
            update["per"] = "module"
    if not trials_said and (fixed or not validation):
        update["trials"] = 0
    # Measured (README): module-wise the likelihood finds better merges on both zoos, for a walk it does not.
    if accuracies and regression.mode == "module-wise" and "objective" not in search.model_fields_set:
        update["objective"] = "nll"
    return search.model_copy(update=update)


def _check_search(said: Choices, experts: Collection[str]) -> None:
    """Refuse to search what the rest of the recipe does not have.

    Raises:
        ValueError: the message names the key.
    """
    search = said.search
    if search.searches("rho") and said.grams.source != "hybrid":
        raise ValueError(
            f"'search.rho': Gram matrices from '{said.grams.source}' are not blended; set grams.source to hybrid"
        )
    if search.searches("task_weights") and said.regression.mode == "propagated":
        raise ValueError(
            "'search.task_weights': a walk's sums over tasks hold one weighting; set regression.mode to module-wise, "
            "or regression.task_weights to numbers"
        )
    if search.trials and search.walk == "every-trial" and said.regression.mode != "propagated":
        raise ValueError("'search.walk': only propagated regression walks; set regression.mode to propagated")
    if search.trials and search.walk == "every-trial" and said.regression.rounds > 1:
        raise ValueError(
            "'regression.rounds': with search.walk: every-trial the last round alone would have a trial's strengths; "
            "set it to 1, or search.walk to once"
        )
    for task in search.floors:
        if task not in (*experts, ALL_TASKS):
            raise ValueError(
                f"'search.floors': there is no task '{task}'; the tasks are {', '.join(experts)}, or '{ALL_TASKS}'"
            )


def _strength(said: Choices) -> RegressionSettings:
    regression = said.regression
    if regression.mode == "none":
        return regression
    if not said.search.trials and "strength" not in regression.model_fields_set:
        walked = regression.mode == "propagated"
        regression = _changed(regression, strength=regression.walk_lambda if walked else DATA_FREE_LAMBDA)
    of_the_walk = isinstance(regression.strength, float | int) or regression.strength == "held-out"
    if of_the_walk and regression.mode == "propagated" and "walk_lambda" not in regression.model_fields_set:
        regression = _changed(regression, walk_lambda=regression.strength)
    return regression


def _changed(regression: RegressionSettings, **changes: Any) -> RegressionSettings:
    return regression.model_copy(update=changes)
