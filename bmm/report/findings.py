"""What a merge.json says, in plain words: shares, rankings, warnings, the sentence that a report opens with.

Pure functions of the document; every sentence is computed from its numbers, written as `bmm.report.notation` has them.
No markup and no drawing here: the page, the card, the figures and the console table each present these findings in
their own way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from bmm.report import notation

Document = Mapping[str, Any]
Interval = tuple[float, float]

ROLES = ("base", "anchor", "merged", "expert")
NOT_AN_ANCHOR = ("base", "experts", "merged")
TREATMENTS = ("regressed", "anchored", "averaged", "copied")

UNMEASURED = "How well it does their tasks was not measured: the recipe names no test rows."
UNMEASURED_ALONE = "Nothing was regressed: it is the anchor alone, and how well it does their tasks was not measured."
_STRENGTHS = {
    "search": "the strength of the prior was searched on validation rows",
    "evidence": "the strength of the prior is the most probable given the experts' weights and Gram matrices, without "
    "validation rows",
    "held-out": "the strength of the prior is the one that errs least on calibration rows held out of the solve, "
    "without validation rows",
    "fixed": "the strength of the prior is as the recipe has it, without a search",
}
_SOURCES = {
    "propagated": "what the merged model itself reads on the calibration rows, layer by layer",
    "activations": "what the experts read on their calibration rows",
    "task-vectors": "the experts' task vectors, without any data",
    "hybrid": "what the experts read on their calibration rows, blended with their task vectors",
    "artifact": "Gram matrices that were made elsewhere",
}

_NUMBERS = (
    "No",
    "One",
    "Two",
    "Three",
    "Four",
    "Five",
    "Six",
    "Seven",
    "Eight",
    "Nine",
    "Ten",
    "Eleven",
    "Twelve",
)


@dataclass(frozen=True)
class MethodShare:
    """One row of the comparison: a method's mean score and its share of the experts' mean, both in 0..1."""

    method: str
    label: str
    settings: Mapping[str, Any]
    mean: float | None
    share: float
    interval: Interval | None


@dataclass(frozen=True)
class TreatmentTotal:
    """How many parameters got one treatment, how many weights they hold, their share of all (0..1)."""

    treatment: str
    parameters: int
    weights: int
    share: float


def confidence(document: Document) -> str:
    """Return the confidence of the intervals as text, "95 %"; it is the recipe's."""
    value = document.get("recipe", {}).get("evaluation", {}).get("confidence", 0.95)
    return f"{100 * value:g} %"


def tasks(document: Document, split: str = "test") -> dict[str, Mapping[str, Any]]:
    """Return a split's metrics by task, without the mean, in the document's order."""
    metrics = document.get("metrics", {}).get(split, {})
    return {name: entry for name, entry in metrics.items() if name != "mean"}


def mean(document: Document, split: str = "test") -> Mapping[str, Any]:
    """Return a split's mean over the tasks, empty where the document has none."""
    found: Mapping[str, Any] = document.get("metrics", {}).get(split, {}).get("mean", {})
    return found


def interval_of(entry: Mapping[str, Any], role: str) -> Interval | None:
    """Return the interval of one role's value in a task's (or the mean's) entry, or None."""
    found = (entry.get("intervals") or {}).get(role)
    return None if found is None else (found[0], found[1])


def share(document: Document, role: str) -> tuple[float | None, Interval | None]:
    """Return base's, anchor's or merged's share of the experts' mean on the test split, with its interval."""
    entry = mean(document)
    value = (entry.get("share_of_experts") or {}).get(role)
    return value, interval_of({"intervals": (entry.get("intervals") or {}).get("share_of_experts")}, role)


def methods(document: Document) -> list[MethodShare]:
    """Return the comparison on the test split, best share first; ties stay in the document's order."""
    rows = []
    for row in document.get("methods") or []:
        found = row.get("share_of_experts") or {}
        if found.get("mean") is None:
            continue
        has_interval = found.get("low") is not None and found.get("high") is not None
        rows.append(
            MethodShare(
                method=row["method"],
                label=notation.method_label(row["method"]),
                settings=row.get("settings") or {},
                mean=row.get("mean"),
                share=found["mean"],
                interval=(found["low"], found["high"]) if has_interval else None,
            )
        )
    return sorted(rows, key=lambda row: -row.share)


def best_anchor(document: Document) -> MethodShare | None:
    """Return the best method in the comparison that can serve as an anchor, else the anchor of this merge."""
    for row in methods(document):
        if row.method not in NOT_AN_ANCHOR:
            return row
    value, interval = share(document, "anchor")
    if value is None:
        return None
    name = document.get("anchor", {}).get("method", "anchor")
    return MethodShare(name, notation.method_label(name), {}, mean(document).get("anchor"), value, interval)


def metric_word(document: Document) -> str:
    """Return what the tasks are measured by, in a word: the metric that all share, else "score"."""
    names = {str(entry.get("metric", "score")) for entry in tasks(document).values()}
    return names.pop() if len(names) == 1 else "score"


def treatments(document: Document) -> list[TreatmentTotal]:
    """Return the coverage added up by treatment, the known ones first; treatments nobody got are left out."""
    parameters: dict[str, int] = {}
    weights: dict[str, int] = {}
    for entry in document.get("coverage") or []:
        name = entry["treatment"]
        parameters[name] = parameters.get(name, 0) + 1
        weights[name] = weights.get(name, 0) + prod(entry["shape"])
    total = max(sum(weights.values()), 1)
    order = [name for name in TREATMENTS if name in weights] + sorted(set(weights) - set(TREATMENTS))
    return [TreatmentTotal(name, parameters[name], weights[name], weights[name] / total) for name in order]


def opening(document: Document) -> str:
    """Return the sentence that says what the merge achieved on the test split."""
    count = len(document.get("experts") or []) or len(tasks(document))
    name = _NUMBERS[count] if count < len(_NUMBERS) else str(count)
    start = f"{name} expert{'' if count == 1 else 's'} became one model"
    value, interval = share(document, "merged")
    if value is None:
        return f"{start}." if tasks(document) else f"{start}. {unmeasured(document)}"
    kept = notation.percent_with_interval(value, interval)
    sentence = f"{start}: it keeps {kept} of their test {metric_word(document)}"
    anchor = best_anchor(document)
    if anchor is not None:
        kept = notation.percent_with_interval(anchor.share, anchor.interval)
        sentence += f"; the best anchor alone, {anchor.label}, keeps {kept}"
    base, base_interval = share(document, "base")
    if base is not None:
        joint = ", and" if anchor is not None else ";"
        kept = notation.percent_with_interval(base, base_interval)
        sentence += f"{joint} the base model with the experts' heads {kept}"
    return sentence + "."


def warnings(document: Document) -> list[str]:
    """Return what must not be overlooked: merged below its anchor, experts no better than the base."""
    found = []
    merged, _ = share(document, "merged")
    own, _ = share(document, "anchor")
    best = best_anchor(document)
    if merged is not None and own is not None and merged < own:
        found.append(
            f"On the test split the merged model is below its own anchor: it keeps {notation.percent(merged)} of the "
            f"experts' mean, the anchor {notation.percent(own)}."
        )
    if merged is not None and best is not None and merged < best.share and best.share != own:
        found.append(
            f"On the test split the best anchor of the comparison, {best.label}, is above the merged model: "
            f"{notation.percent(best.share)} against {notation.percent(merged)} of the experts' mean."
        )
    for role in ("anchor", "base"):
        losses = {
            name: entry[role] - entry["merged"]
            for name, entry in tasks(document).items()
            if _both(entry, role, "merged") and entry["merged"] < entry[role]
        }
        if losses:
            listed = _listed([f"{name} ({notation.points(-loss)} points)" for name, loss in losses.items()])
            plural = "these tasks" if len(losses) > 1 else "this task"
            found.append(f"The merged model is below the {role} on {plural}: {listed}.")
    for name, entry in tasks(document).items():
        if not _both(entry, "expert", "base"):
            continue
        values = f"{notation.percent(entry['expert'])} against {notation.percent(entry['base'])}"
        low = interval_of(entry, "expert")
        if entry["expert"] <= entry["base"]:
            found.append(f"The expert {name} does not beat the base with the same head: {values}.")
        elif low is not None and low[0] <= entry["base"]:
            found.append(f"The expert {name} does not clearly beat the base with the same head: {values}.")
    best_trial = best_of_search(document)
    if best_trial is not None and best_trial.get("origin") == "anchor":
        found.append("The search found nothing better than the anchor: the merged model is the anchor.")
    return found


def unmeasured(document: Document) -> str:
    """Say why nothing was measured."""
    return UNMEASURED_ALONE if strength_rule(document) == "none" else UNMEASURED


def strength_rule(document: Document) -> str:
    """Return how `λ` was chosen: `search`, `evidence`, `held-out` or `fixed`; `none` without regression."""
    return str((document.get("search") or {}).get("lambda", "search"))


def fits_heads(document: Document) -> bool:
    """Return whether a head of the merged model is not its expert's own."""
    layers = ((document.get("search") or {}).get("heads") or {}).get("layers") or {}
    return any(layers.values())


def method(document: Document) -> str:
    """Return what the regression was made from and how its prior's strength was chosen, without a full stop."""
    if strength_rule(document) == "none":
        return "nothing was regressed: the merged model is the anchor itself"
    grams = document.get("grams") or {}
    source = str(grams.get("source", "activations"))
    if ((document.get("recipe") or {}).get("regression") or {}).get("mode") == "propagated":
        source = "propagated"
    of = f", {grams['tokens']} tokens of each sequence (seed {grams['tokens_seed']})" if "tokens" in grams else ""
    fitted = "; each task's last layer is fitted to the merged encoder" if fits_heads(document) else ""
    return f"the regression is on {_SOURCES[source]}{of}; {_STRENGTHS[strength_rule(document)]}{fitted}"


def finished_trials(document: Document) -> list[Mapping[str, Any]]:
    """Return the trials that have an objective, in order of their index."""
    trials = (document.get("search") or {}).get("trials") or []
    return sorted((t for t in trials if t.get("objective") is not None), key=lambda trial: trial["index"])


def best_of_search(document: Document) -> Mapping[str, Any] | None:
    """Return the trial that the search chose, as the trials record it, or None."""
    best = (document.get("search") or {}).get("best") or {}
    return next((trial for trial in finished_trials(document) if trial["index"] == best.get("index")), None)


def _both(entry: Mapping[str, Any], *roles: str) -> bool:
    return all(entry.get(role) is not None for role in roles)


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
