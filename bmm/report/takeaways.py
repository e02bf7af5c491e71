"""The one sentence above each figure, computed from the document. No drawing and no markup here."""

from __future__ import annotations

from bmm.report import findings, notation, search_findings
from bmm.report.findings import Document


def takeaways(document: Document) -> dict[str, str]:
    """Return a sentence for each figure that the document has data for, by the figure's name."""
    sentences = {
        "tasks": tasks_sentence(document),
        "methods": methods_sentence(document),
        "search": search_sentence(document),
        "importance": importance_sentence(document),
        "trades": trades_sentence(document),
        "lambda": lambda_sentence(document),
    }
    return {name: sentence for name, sentence in sentences.items() if sentence}


def tasks_sentence(document: Document) -> str:
    """Say how near the merged model comes to its experts, and where it loses and gains most."""
    differences = {
        name: entry["merged"] - entry["expert"]
        for name, entry in findings.tasks(document).items()
        if entry.get("merged") is not None and entry.get("expert") is not None
    }
    if not differences:
        return ""
    # Scores are often multiples of one over the rows, so a point is a point only up to rounding.
    near = sum(difference >= -0.01 - 1e-9 for difference in differences.values())
    sentence = f"On {near} of {len(differences)} tasks the merged model is at most one point below its expert"
    if near == 0:
        sentence = "On every task the merged model is more than one point below its expert"
    worst = min(differences, key=lambda name: differences[name])
    best = max(differences, key=lambda name: differences[name])
    if differences[worst] < 0:
        sentence += f"; it loses most on {worst} ({notation.points(differences[worst])} points)"
    if differences[best] > 0:
        sentence += f"; it gains most on {best} ({notation.points(differences[best])} points)"
    return sentence + "."


def methods_sentence(document: Document) -> str:
    """Say where merged ranks among the merging methods, and whether the intervals tell them apart."""
    rows = [row for row in findings.methods(document) if row.method not in ("base", "experts")]
    merged = next((row for row in rows if row.method == "merged"), None)
    others = [row for row in rows if row.method != "merged"]
    if merged is None or not others:
        return ""
    best = others[0]
    gap = merged.share - best.share
    if gap > 0:
        sentence = f"The merged model ranks first of {len(rows)}, {notation.number(gap)} points of share ahead of "
    elif gap == 0:
        sentence = "The merged model ties with "
    else:
        rank = rows.index(merged) + 1
        sentence = f"The merged model ranks {rank} of {len(rows)}, {notation.number(-gap)} points of share behind "
    sentence += best.label
    if merged.interval is None or best.interval is None:
        return sentence + "."
    overlap = merged.interval[0] <= best.interval[1] and best.interval[0] <= merged.interval[1]
    return sentence + (" (the intervals overlap)." if overlap else " (the intervals do not overlap).")


def search_sentence(document: Document) -> str:
    """Say which trial was taken, what it gained over the anchor, and how many trials had no result."""
    trials = findings.finished_trials(document)
    best = findings.best_of_search(document)
    if not trials or best is None:
        return ""
    sentence = (
        f"Trial {best['index']} ({best.get('origin', 'unknown')}) was taken of {len(trials)}: it has "
        f"{search_findings.objective_text(document, best['objective'])}"
    )
    anchor = next((trial for trial in trials if trial.get("origin") == "anchor"), None)
    if anchor is not None and anchor["index"] != best["index"]:
        gain = best["objective"] - anchor["objective"]
        share = search_findings.objective_scale(document) == 100
        apart = f"{notation.points(gain)} points" if share else notation.decimals(gain, 3, signed=True)
        sentence += f", {apart} against the anchor"
    sentence += search_findings.shares_text(document, best["index"], anchor)
    stopped = sum(trial.get("state") == "stopped" for trial in trials)
    if stopped:
        sentence += f"; {stopped} {'was' if stopped == 1 else 'were'} stopped early (hollow), as they could not win"
    failed = len(document["search"]["trials"]) - len(trials)
    return sentence + (f"; {failed} more gave no result." if failed else ".")


def importance_sentence(document: Document) -> str:
    """Say which hyperparameter mattered most."""
    found = (document.get("search") or {}).get("importance") or []
    if not found:
        return ""
    first = found[0]
    sentence = f"Most of the search's ups and downs come from {first['name']} ({100 * first['share']:.0f} %)"
    if len(found) > 1:
        rest = found[1]
        sentence += f", then from {rest['name']} ({100 * rest['share']:.0f} %)"
    return sentence + "; shares are of a model fitted to the trials, and overlap where settings act together."


def trades_sentence(document: Document) -> str:
    """Say which two tasks were traded against each other."""
    if not search_findings.comparable_trials(document):
        return ""
    opposed = search_findings.opposed_tasks(document)
    if opposed is None:
        return (
            "No two tasks are traded against each other: what is good for one is good for the others, or indifferent."
        )
    one, other, value = opposed
    return (
        f"What is good for {one} tends to be bad for {other} (correlation {notation.decimals(value, 2)} over the "
        "trials); the line joins the trials that no other one beats in both."
    )


def lambda_sentence(document: Document) -> str:
    """Say over what range the chosen prior strengths run, and what small and large mean."""
    found = {
        entry["lambda"]: entry["module"]
        for entry in document.get("coverage") or []
        if entry["treatment"] == "regressed" and entry.get("lambda") is not None
    }
    if not found:
        return ""
    low, high = min(found), max(found)
    reading = "the smaller λ, the more the experts' data decide; the larger, the more the anchor"
    if low == high:
        return f"Every regressed matrix uses λ = {notation.lambda_text(low)}: {reading}."
    lowest, highest = (f"{notation.lambda_text(value)} ({found[value]})" for value in (low, high))
    return f"λ runs from {lowest} to {highest}: {reading}."
